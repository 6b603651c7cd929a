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

LAYER_TENSORS = ("input_layernorm.weight", "input_layernorm.bias", "self_attn.q_proj.weight", "self_attn.k_proj.weight",
                 "self_attn.v_proj.weight", "self_attn.o_proj.weight", "post_attention_layernorm.weight",
                 "post_attention_layernorm.bias", "mlp.up_proj.weight", "mlp.down_proj.weight")


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
        self.eps = c.get("norm_eps", 1e-5)
        self.layers = [tuple(self.weights[f"model.layers.{layer}.{name}"] for name in LAYER_TENSORS)
                       for layer in range(c["num_hidden_layers"])]

    def compile(self):
        """Has a layer compiled at its first call: one for all of them, which differ in their tensors only."""
        self.block = torch.compile(self.block, dynamic=False)

    def norm(self, x, weight, bias):
        return F.layer_norm(x.float(), (x.shape[-1],), weight.float() + 1.0, bias.float(), self.eps).to(self.dtype)

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

    def block(self, x, positions, tensors, keys, values):
        """One layer. `keys` and `values` are its cache [B, kv heads, length, head_dim], or None."""
        norm_weight, norm_bias, wq, wk, wv, wo, post_weight, post_bias, up, down = tensors
        batch, length, _ = x.shape
        h = self.norm(x, norm_weight, norm_bias)
        q, k, v = [F.linear(h, w).view(batch, length, -1, self.head_dim) for w in (wq, wk, wv)]
        q, k = self.rotate(q, positions), self.rotate(k, positions)
        q, k, v = [t.transpose(1, 2) for t in (q, k, v)]
        if keys is not None:
            index = positions[:, None, :, None].expand(-1, self.kv_heads, -1, self.head_dim)
            keys.scatter_(2, index, k)
            values.scatter_(2, index, v)
            k, v = keys, values
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=keys is None, enable_gqa=True)
        x = x + F.linear(attended.transpose(1, 2).reshape(batch, length, -1), wo)
        h = F.relu(F.linear(self.norm(x, post_weight, post_bias), up)).square()
        return x + F.linear(h, down)

    def forward(self, tokens, positions, cache=None):
        """Logits [B, T, V]. Without a cache: causal over the tokens. With one: keys and values of row b are written at
        positions[b, 0] (T = 1), and every slot is seen."""
        x = F.embedding(tokens, self.weights["model.embed_tokens.weight"])
        for layer, tensors in enumerate(self.layers):
            keys, values = (None, None) if cache is None else (cache[0][layer], cache[1][layer])
            x = self.block(x, positions, tensors, keys, values)
        x = self.norm(x, self.weights["model.norm.weight"], self.weights["model.norm.bias"])
        return F.linear(x, self.weights["lm_head.weight"])
