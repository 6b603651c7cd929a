#!/usr/bin/env python3
"""Makes the golden logits and greedy continuations from Hugging Face's NemotronForCausalLM in fp32.

Needs torch, sentencepiece, safetensors and transformers >= 4.45 (older releases rotate 42 instead of 64 dims when
head_dim is not hidden_size / heads). From the repository's root:
  python3 tests/engine/goldens/make_goldens.py
Writes, beside this file:
  ratio8b/   a random 2-layer checkpoint with the 8B's ratios: 48 query heads, 8 kv heads, head_dim 128, rotary 64
  NAME.json  prompts (token ids), greedy continuations, smallest gap between best and second logit on the way
  NAME.bin   logits, fp32 little-endian, [row, vocab]: every position of prompt 0, then the last of each other prompt
"""

import inspect
import json
import pathlib

import sentencepiece
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import NemotronConfig, NemotronForCausalLM
from transformers.models.nemotron import modeling_nemotron

HERE = pathlib.Path(__file__).resolve().parent
TINY = HERE.parents[2] / "deploy" / "models" / "minitron-tiny"
NUM_NEW_TOKENS = 48

TEXTS = [
    "To be or not to be, that is the question. Whether it is nobler in the mind",
    "Once upon a time",
    "The",
    "It was the best of times, it was the worst of times, it was the age of wisdom, it was the age of",
    "In the beginning\n\nGod created the heaven and the earth. And the earth was",
    # Longer than a dozen KV blocks.
    "He said that he would come back in the morning, but the night was long and the road was dark. " * 9,
]


def accept_layer_norm_bias_argument():
    """torch < 2.1 has LayerNorm without the `bias` switch that the model passes (as True); drop it there."""
    if "bias" in inspect.signature(torch.nn.LayerNorm.__init__).parameters:
        return
    original = torch.nn.LayerNorm.__init__

    def init(self, shape, eps=1e-5, elementwise_affine=True, bias=True, device=None, dtype=None):
        assert bias
        original(self, shape, eps, elementwise_affine, device, dtype)

    torch.nn.LayerNorm.__init__ = init


def rotary_width(model, config):
    """The number of rotated dims, from the table the model really uses."""
    rotary = modeling_nemotron.NemotronRotaryEmbedding(config=config)
    cos, _ = rotary(torch.zeros(1, 1, 1, 1), torch.zeros(1, 1, dtype=torch.long))
    del model
    return cos.shape[-1]


def load(folder):
    """The checkpoint in fp32: bf16 weights widened exactly, so 1 + weight is added in fp32 as the server does."""
    config = NemotronConfig(**json.loads((folder / "config.json").read_text()))
    config._attn_implementation = "eager"
    model = NemotronForCausalLM(config).float().eval()
    weights = {name: tensor.float() for name, tensor in load_file(folder / "model.safetensors").items()}
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert not unexpected and all("inv_freq" in name for name in missing), (missing, unexpected)
    assert rotary_width(model, config) == config.head_dim // 2, rotary_width(model, config)
    return model, config


def logits_of(model, tokens):
    with torch.no_grad():
        return model(torch.tensor([tokens])).logits[0].float()


def write_goldens(name, folder, prompts):
    model, config = load(folder)
    rows, continuations, smallest_gap = [], [], float("inf")
    for index, prompt in enumerate(prompts):
        logits = logits_of(model, prompt)
        rows.append(logits if index == 0 else logits[-1:])
        tokens = list(prompt)
        for _ in range(NUM_NEW_TOKENS):
            last = logits_of(model, tokens)[-1]
            best = torch.topk(last, 2).values
            smallest_gap = min(smallest_gap, float(best[0] - best[1]))
            tokens.append(int(torch.argmax(last)))
        continuations.append(tokens[len(prompt):])
    table = torch.cat(rows)
    (HERE / f"{name}.bin").write_bytes(table.numpy().astype("<f4").tobytes())
    (HERE / f"{name}.json").write_text(json.dumps({
        "transformers": transformers.__version__,
        "vocab_size": config.vocab_size,
        "smallest_gap": smallest_gap,
        "prompts": prompts,
        "continuations": continuations,
    }, separators=(",", ":")) + "\n")
    print(f"{name}: {table.shape[0]} rows, logits std {table.std():.3f}, largest {table.abs().max():.2f}, "
          f"smallest gap {smallest_gap:.5f}")


def make_ratio8b(folder):
    """Random weights at a scale at which attention is neither uniform nor one-hot; no norm weight or bias is zero."""
    torch.manual_seed(8)
    settings = dict(
        hidden_size=96, intermediate_size=384, num_hidden_layers=2, num_attention_heads=48, num_key_value_heads=8,
        head_dim=128, vocab_size=512, max_position_embeddings=512, norm_eps=1e-5, rope_theta=10000.0,
        partial_rotary_factor=0.5, hidden_act="relu2", attention_bias=False, mlp_bias=False, tie_word_embeddings=False,
        bos_token_id=2, eos_token_id=3)
    model = NemotronForCausalLM(NemotronConfig(**settings))
    weights = {}
    for name, tensor in model.state_dict().items():
        if "inv_freq" in name:
            continue
        if tensor.dim() == 2:
            gain = {"embed_tokens": 1.0, "lm_head": 1.5}.get(name.split(".")[-2], 1.2)
            fan_in = 1 if "embed_tokens" in name else tensor.shape[1]
            value = torch.randn(tensor.shape) * gain / fan_in ** 0.5
        else:
            value = torch.randn(tensor.shape) * 0.2
        weights[name] = value.to(torch.bfloat16).contiguous()
    folder.mkdir(exist_ok=True)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    settings = {"architectures": ["NemotronForCausalLM"], "model_type": "nemotron", **settings,
                "torch_dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(settings, indent=2) + "\n")


def main():
    torch.set_num_threads(1)
    accept_layer_norm_bias_argument()
    tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(TINY / "tokenizer.model"))
    write_goldens("tiny", TINY, [tokenizer.encode(text) for text in TEXTS])
    make_ratio8b(HERE / "ratio8b")
    generator = torch.Generator().manual_seed(5)
    lengths = [37, 1, 5, 16, 17, 150]
    write_goldens("ratio8b", HERE / "ratio8b",
                  [torch.randint(4, 512, (n,), generator=generator).tolist() for n in lengths])


if __name__ == "__main__":
    main()
