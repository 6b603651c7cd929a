#!/usr/bin/env python3
"""Writes a checkpoint of minitron-make-checkpoint as GGUF in bf16, for programs of llama.cpp's family.

    make_gguf.py [--architecture nemotron|llama] CHECKPOINT_DIR OUT.gguf

nemotron: the same model, tensor by tensor. llama: a model of the same shape for peers that know no nemotron; its
feed-forward block has three matrices instead of two, so each is a third narrower, rounded down to 256 (never more bytes
than ours). Its weights are cut from the checkpoint's: what they are worth does not matter here, only how many they are.

The vocabulary is made up, one plain word per token, so that servers that want one start and every token is text.
"""
import argparse
import json
import pathlib
from typing import Any

import gguf
import numpy as np

Tensors = dict[str, np.ndarray]
BF16 = gguf.GGMLQuantizationType.BF16


def read_checkpoint(folder: pathlib.Path) -> tuple[dict[str, Any], Tensors]:
    """The configuration and the tensors as uint16 (bits of bf16), mapped from the file."""
    path = folder / "model.safetensors"
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header: dict[str, Any] = json.loads(file.read(length))
    data = np.memmap(path, dtype=np.uint8, mode="r", offset=8 + length)
    tensors = {}
    for name, entry in header.items():
        if entry["dtype"] != "BF16":
            raise SystemExit(f"make_gguf: {name} is {entry['dtype']}, not BF16")
        begin, end = entry["data_offsets"]
        tensors[name] = data[begin:end].view(np.uint16).reshape(entry["shape"])
    return json.loads((folder / "config.json").read_text()), tensors


def to_float(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def add_shape(writer: gguf.GGUFWriter, config: dict[str, Any], feed_forward: int, rotary_dim: int) -> None:
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(feed_forward)
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_rope_dimension_count(rotary_dim)
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_vocab_size(config["vocab_size"])


def add_vocabulary(writer: gguf.GGUFWriter, size: int) -> None:
    special = ["<unk>", "<unused>", "<s>", "</s>"]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(special + [f"\u2581w{i}" for i in range(len(special), size)])
    writer.add_token_scores([0.0] * size)
    kinds = [gguf.TokenType.UNKNOWN] + [gguf.TokenType.CONTROL] * 3
    writer.add_token_types([int(kind) for kind in kinds] + [int(gguf.TokenType.NORMAL)] * (size - len(kinds)))
    writer.add_bos_token_id(2)
    writer.add_eos_token_id(3)
    writer.add_unk_token_id(0)
    writer.add_add_bos_token(False)


def add_matrix(writer: gguf.GGUFWriter, name: str, bits: np.ndarray) -> None:
    writer.add_tensor(name, np.ascontiguousarray(bits).view(np.uint8), raw_dtype=BF16)


def add_model(writer: gguf.GGUFWriter, config: dict[str, Any], tensors: Tensors, as_llama: bool) -> None:
    def norm(theirs: str, ours: str) -> None:
        # The checkpoint holds weight - 1; GGUF wants the factor itself.
        writer.add_tensor(f"{theirs}.weight", to_float(tensors[f"{ours}.weight"]) + np.float32(1))
        if not as_llama:
            writer.add_tensor(f"{theirs}.bias", to_float(tensors[f"{ours}.bias"]))

    add_matrix(writer, "token_embd.weight", tensors["model.embed_tokens.weight"])
    for layer in range(config["num_hidden_layers"]):
        ours, theirs = f"model.layers.{layer}", f"blk.{layer}"
        norm(f"{theirs}.attn_norm", f"{ours}.input_layernorm")
        for short, long in (("q", "q_proj"), ("k", "k_proj"), ("v", "v_proj"), ("output", "o_proj")):
            add_matrix(writer, f"{theirs}.attn_{short}.weight", tensors[f"{ours}.self_attn.{long}.weight"])
        norm(f"{theirs}.ffn_norm", f"{ours}.post_attention_layernorm")
        up, down = tensors[f"{ours}.mlp.up_proj.weight"], tensors[f"{ours}.mlp.down_proj.weight"]
        if as_llama:
            width = llama_feed_forward(config)
            add_matrix(writer, f"{theirs}.ffn_gate.weight", up[-width:])
            up, down = up[:width], down[:, :width]
        add_matrix(writer, f"{theirs}.ffn_up.weight", up)
        add_matrix(writer, f"{theirs}.ffn_down.weight", down)
    norm("output_norm", "model.norm")
    add_matrix(writer, "output.weight", tensors["lm_head.weight"])


def llama_feed_forward(config: dict[str, Any]) -> int:
    return int(config["intermediate_size"]) * 2 // 3 // 256 * 256


def main() -> None:
    parser = argparse.ArgumentParser(description="A random checkpoint as GGUF in bf16.")
    parser.add_argument("--architecture", choices=("nemotron", "llama"), default="nemotron")
    parser.add_argument("checkpoint", type=pathlib.Path)
    parser.add_argument("out", type=pathlib.Path)
    arguments = parser.parse_args()
    config, tensors = read_checkpoint(arguments.checkpoint)
    head_dim, as_llama = config["head_dim"], arguments.architecture == "llama"
    if not as_llama and config["num_attention_heads"] * head_dim != config["hidden_size"]:
        raise SystemExit("make_gguf: llama.cpp wants queries as wide as the hidden state; use the shape 1b-square")
    partial = arguments.out.with_suffix(".partial")
    writer = gguf.GGUFWriter(partial, arguments.architecture)
    if as_llama:
        writer.add_layer_norm_rms_eps(config["norm_eps"])
        add_shape(writer, config, llama_feed_forward(config), head_dim)
    else:
        writer.add_layer_norm_eps(config["norm_eps"])
        add_shape(writer, config, config["intermediate_size"], int(head_dim * config["partial_rotary_factor"]))
    add_vocabulary(writer, config["vocab_size"])
    add_model(writer, config, tensors, as_llama)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    partial.rename(arguments.out)


if __name__ == "__main__":
    main()
