#!/usr/bin/env python3
"""Peers on the same machine, in the same run, on the same weights.

    peers.py MODEL_DIR      prints JSON lines

torch, recorded steps: a decode loop over a static cache, the whole step in one CUDA graph (eager where there is no
device). torch, sdpa and torch, matmul: PyTorch's kernels at the 8B's shapes. What a machine lacks is left out with a
note.
"""
import json
import sys
import time

import torch
import torch.nn.functional as F

from nemotron_torch import Nemotron

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"


def emit(**record):
    print(json.dumps(record), flush=True)


def wait():
    if CUDA:
        torch.cuda.synchronize()


def median_seconds(run, repeats):
    """The median time of a call that was made once before."""
    run()
    times = []
    for _ in range(repeats):
        wait()
        begin = time.perf_counter()
        run()
        wait()
        times.append(time.perf_counter() - begin)
    return sorted(times)[len(times) // 2]


def decode_loop(model, batch, context):
    """Seconds per greedy decode step of `batch` sequences with `context` tokens in the cache."""
    cache = model.make_cache(batch, context)
    tokens = torch.full((batch, 1), 5, device=DEVICE)
    positions = torch.full((batch, 1), context - 1, device=DEVICE)
    mask = torch.zeros((batch, 1, 1, context), device=DEVICE, dtype=model.dtype)

    def step():
        tokens.copy_(model.forward(tokens, positions, cache, mask).argmax(-1))

    if not CUDA:
        return median_seconds(step, 3)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return median_seconds(graph.replay, 20)


def model_peers(folder):
    model = Nemotron(folder, DEVICE, torch.bfloat16)
    small = model.config["hidden_size"] < 1024
    context = 64 if small else 512
    for batch in (1, 4) if small else (1, 8, 32, 64):
        try:
            seconds = decode_loop(model, batch, context)
        except torch.cuda.OutOfMemoryError:
            emit(kind="note", text=f"torch has no memory for a batch of {batch}")
            break
        emit(kind="peer", name="torch, recorded steps", batch=batch, context=context, tokens_per_s=batch / seconds,
             ms=seconds * 1e3)


def kernel_peers():
    if not CUDA:
        emit(kind="note", text="no device: no kernels to compare")
        return
    for batch, context in ((1, 2048), (64, 512), (64, 2048)):
        q = torch.randn(batch, 48, 1, 128, device=DEVICE, dtype=torch.bfloat16)
        k, v = [torch.randn(batch, 8, context, 128, device=DEVICE, dtype=torch.bfloat16) for _ in range(2)]
        seconds = median_seconds(lambda: F.scaled_dot_product_attention(q, k, v, enable_gqa=True), 20)
        emit(kind="peer_kernel", name="torch, sdpa", rows=batch, context=context, us=seconds * 1e6)
    for rows in (1, 64, 256):
        x = torch.randn(rows, 4096, device=DEVICE, dtype=torch.bfloat16)
        weights = [torch.randn(16384, 4096, device=DEVICE, dtype=torch.bfloat16) for _ in range(4)]
        seconds = median_seconds(lambda: [F.linear(x, w) for w in weights], 20) / len(weights)
        emit(kind="peer_kernel", name="torch, matmul fc1", rows=rows, us=seconds * 1e6)


def main():
    emit(kind="note", text=f"torch {torch.__version__}, cuda {torch.version.cuda}")
    with torch.no_grad():
        model_peers(sys.argv[1])
        kernel_peers()
    return 0


if __name__ == "__main__":
    sys.exit(main())
