"""Writes tests/engine/testdata/: checkpoints as torch.save makes them, for torch_pickle_test.cc.

Run with any torch >= 1.6; the committed files were made with 1.13. The values are exact in bf16:
element i of a tensor is (i - 5) / 4, so the test can recompute them.
"""

import collections
import pathlib
import sys

import torch


def ramp(*shape):
    count = 1
    for dim in shape:
        count *= dim
    return ((torch.arange(count, dtype=torch.float32) - 5) / 4).reshape(shape)


def state_dict():
    tensors = collections.OrderedDict()
    tensors["model.embed_tokens.weight"] = ramp(6, 4).to(torch.bfloat16)
    tensors["model.norm.weight"] = ramp(4).to(torch.bfloat16)
    tensors["half"] = ramp(3, 2).to(torch.float16)
    tensors["single"] = ramp(2, 3)
    tensors["scalar"] = torch.tensor(2.5, dtype=torch.float32)
    tensors["second_half_of_single"] = tensors["single"][1:]  # shares the storage, offset 3
    # What torch.nn.Module.state_dict() attaches: pickled as the attributes of the OrderedDict.
    tensors._metadata = collections.OrderedDict({"": {"version": 1}})
    return tensors


def main():
    folder = pathlib.Path(sys.argv[1] if len(sys.argv) > 1 else pathlib.Path(__file__).parent / "testdata")
    folder.mkdir(exist_ok=True)
    torch.save(state_dict(), folder / "torch_state_dict.bin")
    torch.save({"transposed": ramp(2, 3).t()}, folder / "torch_transposed.bin")
    torch.save({"wide": ramp(2).double()}, folder / "torch_double.bin")
    torch.save(state_dict(), folder / "torch_legacy.bin", _use_new_zipfile_serialization=False)


if __name__ == "__main__":
    main()
