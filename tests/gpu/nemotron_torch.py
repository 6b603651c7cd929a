"""Nemotron in PyTorch, from a folder in Hugging Face's layout: the reference of layers_check.py and a peer of peers.py.

Written from the architecture, not from our engine: sequential blocks, LayerNorm with 1 + weight, grouped query
attention, rotary embedding of the first half of each head, squared ReLU, untied head.
"""
import json
import mmap
import pathlib
import struct

import torch
import torch.nn.functional as F


def load_tensors(path, device):
    """The tensors of a safetensors file, bf16."""
    with open(path, "rb") as file:
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    (header_bytes,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8:8 + header_bytes])
    tensors = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        if entry["dtype"] != "BF16":
            raise ValueError(f"{name} is {entry['dtype']}, not BF16")
        begin, end = entry["data_offsets"]
        flat = torch.frombuffer(data, dtype=torch.bfloat16, count=(end - begin) // 2, offset=8 + header_bytes + begin)
        tensors[name] = flat.view(entry["shape"]).to(device)
    return tensors


class Nemotron:
    """The network with a cache of fixed size. Activations in `dtype`."""

    def __init__(self, folder, device, dtype):
        folder = pathlib.Path(folder)
        self.config = json.loads((folder / "config.json").read_text())
        self.device, self.dtype = device, dtype
        self.weights = {name: tensor.to(dtype) for name, tensor in
                        load_tensors(folder / "model.safetensors", device).items()}
        c = self.config
        self.heads, self.kv_heads = c["num_attention_heads"], c["num_key_value_heads"]
        self.head_dim = c.get("head_dim") or c["hidden_size"] // self.heads
        self.rotary = int(self.head_dim * c.get("partial_rotary_factor", 0.5))
        steps = torch.arange(0, self.rotary, 2, device=device, dtype=torch.float32) / self.rotary
        self.frequencies = 1.0 / c.get("rope_theta", 10000.0) ** steps

    def norm(self, x, name):
        weight = self.weights[name + ".weight"].float() + 1.0
        return F.layer_norm(x.float(), (x.shape[-1],), weight, self.weights[name + ".bias"].float(),
                            self.config.get("norm_eps", 1e-5)).to(self.dtype)

    def rotate(self, x, positions):
        """x [B, T, heads, head_dim], positions [B, T]."""
        angles = positions[..., None].float() * self.frequencies
        cosine, sine = [f(angles).repeat(1, 1, 2)[:, :, None, :].to(self.dtype) for f in (torch.cos, torch.sin)]
        turned, rest = x[..., :self.rotary], x[..., self.rotary:]
        low, high = turned.chunk(2, dim=-1)
        return torch.cat((turned * cosine + torch.cat((-high, low), dim=-1) * sine, rest), dim=-1)

    def make_cache(self, batch, length):
        shape = (self.config["num_hidden_layers"], batch, self.kv_heads, length, self.head_dim)
        return (torch.zeros(shape, device=self.device, dtype=self.dtype),
                torch.zeros(shape, device=self.device, dtype=self.dtype))

    def forward(self, tokens, positions, cache=None, mask=None):
        """Logits [B, T, V]. Without a cache: causal over the tokens. With one: keys and values of row b are written at
        positions[b, 0] (T = 1), and `mask` [B, 1, 1, length] says which slots are seen."""
        w = self.weights
        x = F.embedding(tokens, w["model.embed_tokens.weight"])
        batch, length = tokens.shape
        for layer in range(self.config["num_hidden_layers"]):
            prefix = f"model.layers.{layer}."
            h = self.norm(x, prefix + "input_layernorm")
            q, k, v = [F.linear(h, w[f"{prefix}self_attn.{n}_proj.weight"]).view(batch, length, -1, self.head_dim)
                       for n in "qkv"]
            q, k = self.rotate(q, positions), self.rotate(k, positions)
            q, k, v = [t.transpose(1, 2) for t in (q, k, v)]
            if cache is not None:
                index = positions[:, None, :, None].expand(-1, self.kv_heads, -1, self.head_dim)
                cache[0][layer].scatter_(2, index, k)
                cache[1][layer].scatter_(2, index, v)
                k, v = cache[0][layer], cache[1][layer]
            groups = self.heads // self.kv_heads
            k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
            attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=cache is None)
            attended = attended.transpose(1, 2).reshape(batch, length, -1)
            x = x + F.linear(attended, w[prefix + "self_attn.o_proj.weight"])
            h = self.norm(x, prefix + "post_attention_layernorm")
            h = F.relu(F.linear(h, w[prefix + "mlp.up_proj.weight"])).square()
            x = x + F.linear(h, w[prefix + "mlp.down_proj.weight"])
        return F.linear(self.norm(x, "model.norm"), w["lm_head.weight"])
