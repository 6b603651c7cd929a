#!/usr/bin/env python3
"""Peers on the same machine, in the same run, on the same weights.

    peers.py MODEL_DIR [NAME]      prints JSON lines, of one peer or of all

torch, recorded steps: a decode loop over a static cache, the whole step in one CUDA graph (eager where there is no
device). torch, compiled steps: the same with its layers compiled by torch.compile. transformers: its continuous batching. llama.cpp: llama-bench on the model as GGUF, both named by
MINITRON_LLAMA_BENCH and MINITRON_LLAMA_GGUF. flashinfer, torch: their attention and products at the 8B's shapes. A peer
that is not here, or does not take the model, is skipped with its reason.
"""
import json
import os
import shutil
import subprocess
import sys
import time


class Missing(Exception):
    """Why a peer is skipped."""


def emit(**record):
    print(json.dumps(record), flush=True)


def need(module):
    """Imports a module a peer is made of."""
    try:
        return __import__(module)
    except ImportError as error:
        raise Missing(f"no {module} here: {error}") from None


def need_cuda(torch):
    if not torch.cuda.is_available():
        raise Missing("no device")


def wait(torch):
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def median_seconds(torch, run, repeats):
    """The median time of a call that was made once before."""
    run()
    times = []
    for _ in range(repeats):
        wait(torch)
        begin = time.perf_counter()
        run()
        wait(torch)
        times.append(time.perf_counter() - begin)
    return sorted(times)[len(times) // 2]


def decode_loop(torch, model, batch, context):
    """Seconds per greedy decode step of `batch` sequences with `context` tokens in the cache."""
    device = model.device
    cache = model.make_cache(batch, context)
    tokens = torch.full((batch, 1), 5, device=device)
    positions = torch.full((batch, 1), context - 1, device=device)

    def step():
        tokens.copy_(model.forward(tokens, positions, cache).argmax(-1))

    if device == "cpu":
        return median_seconds(torch, step, 3)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return median_seconds(torch, graph.replay, 20)


def is_small(folder):
    with open(os.path.join(folder, "config.json"), encoding="utf-8") as file:
        return json.load(file)["hidden_size"] < 1024


def torch_loop(name, folder, compiled=False):
    torch = need("torch")
    from nemotron_torch import Nemotron
    emit(kind="note", text=f"torch {torch.__version__}, cuda {torch.version.cuda}")
    small = is_small(folder)
    with torch.no_grad():
        model = Nemotron(folder, "cuda" if torch.cuda.is_available() else "cpu", torch.bfloat16)
        if compiled:
            model.compile()
        context = 64 if small else 512
        for batch in (1, 4) if small else (64, 1) if compiled else (1, 8, 32, 64):
            try:
                seconds = decode_loop(torch, model, batch, context)
            except torch.cuda.OutOfMemoryError:
                emit(kind="note", text=f"torch has no memory for a batch of {batch}")
                break
            emit(kind="peer", name=name, batch=batch, context=context, tokens_per_s=batch / seconds, ms=seconds * 1e3)


def torch_compiled_loop(name, folder):
    torch_loop(name, folder, compiled=True)


def load_for_batching(torch, folder):
    """transformers' model with the first paged attention it takes; versions name them differently."""
    from transformers import NemotronForCausalLM
    refusals = []
    for attention in ("paged|sdpa", "sdpa", "sdpa_paged"):
        try:
            return NemotronForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, device_map="cuda",
                                                       attn_implementation=attention)
        except (ImportError, AttributeError, ValueError, KeyError, OSError) as error:
            refusals.append(f"{attention}: {error}"[:120])
    raise Missing(f"transformers does not take it: {'; '.join(refusals)}")


def transformers_batching(name, folder):
    """Output tokens per second of 64 requests of 512 tokens that generate 128."""
    torch = need("torch")
    need("transformers")
    need_cuda(torch)
    from transformers import GenerationConfig
    model = load_for_batching(torch, folder)
    generate = getattr(model, "generate_batch", None)
    if generate is None:
        raise Missing("transformers does not take it: it has no generate_batch")
    requests, prompt, output = 64, 512, 128
    vocab = model.config.vocab_size
    inputs = [[(7919 * r + 31 * t) % vocab for t in range(prompt)] for r in range(requests)]
    config = GenerationConfig(max_new_tokens=output, do_sample=False, eos_token_id=-1, pad_token_id=0)
    with torch.no_grad():
        generate(inputs=inputs[:2], generation_config=config)
        begin = time.perf_counter()
        results = generate(inputs=inputs, generation_config=config)
        seconds = time.perf_counter() - begin
    # Without what it takes to start the batching, where the version says when requests came and went.
    ends = [result.lifespan[1] for result in results.values() if getattr(result, "lifespan", (0, 0))[1] > begin]
    if len(ends) == requests:
        seconds = max(ends) - min(result.created_time for result in results.values())
    tokens = sum(len(result.generated_tokens) for result in results.values())
    if tokens < requests * output:
        errors = {str(result.error) for result in results.values() if getattr(result, "error", None)}
        raise Missing(f"transformers gave {tokens} of {requests * output} tokens: {'; '.join(sorted(errors))[:200]}")
    emit(kind="peer", name=name, batch=requests, context=prompt, tokens_per_s=tokens / seconds, ms=seconds * 1e3)


def llama_cpp(name, _folder):
    program = os.environ.get("MINITRON_LLAMA_BENCH") or shutil.which("llama-bench")
    model = os.environ.get("MINITRON_LLAMA_GGUF")
    if not program:
        raise Missing("no llama-bench here; MINITRON_LLAMA_BENCH names one")
    if not model:
        raise Missing("no GGUF of the model; MINITRON_LLAMA_GGUF names one")
    result = subprocess.run([program, "-m", model, "-p", "512", "-n", "128", "-ngl", "99", "-o", "json"],
                            capture_output=True, text=True, timeout=120)
    if result.returncode != 0:
        raise Missing(f"llama-bench ended with status {result.returncode}: {result.stderr[-200:]}")
    for record in json.loads(result.stdout):
        if record["n_gen"] > 0:
            emit(kind="peer", name=name, batch=1, context=512, tokens_per_s=record["avg_ts"])
        else:
            emit(kind="peer", name=f"{name}, prompt", batch=1, context=512, tokens_per_s=record["avg_ts"])


SHAPES = ((1, 2048), (64, 512), (64, 2048))  # rows, tokens in the cache


def flashinfer_kernels(name, _folder):
    torch = need("torch")
    flashinfer = need("flashinfer")
    need_cuda(torch)
    page = 32
    for batch, context in SHAPES:
        pages = context // page
        wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
            torch.empty(128 << 20, dtype=torch.uint8, device="cuda"), "HND", use_tensor_cores=True)
        cache = torch.randn(batch * pages, 2, 8, page, 128, device="cuda", dtype=torch.bfloat16)
        q = torch.randn(batch, 48, 128, device="cuda", dtype=torch.bfloat16)
        wrapper.plan(torch.arange(batch + 1, dtype=torch.int32, device="cuda") * pages,
                     torch.arange(batch * pages, dtype=torch.int32, device="cuda"),
                     torch.full((batch,), page, dtype=torch.int32, device="cuda"), 48, 8, 128, page,
                     q_data_type=torch.bfloat16)
        seconds = median_seconds(torch, lambda: wrapper.run(q, cache), 20)
        emit(kind="peer_kernel", name=name, rows=batch, context=context, us=seconds * 1e6)


def torch_kernels(name, _folder):
    torch = need("torch")
    need_cuda(torch)
    functional = torch.nn.functional
    for batch, context in SHAPES:
        q = torch.randn(batch, 48, 1, 128, device="cuda", dtype=torch.bfloat16)
        k, v = [torch.randn(batch, 8, context, 128, device="cuda", dtype=torch.bfloat16) for _ in range(2)]
        seconds = median_seconds(
            torch, lambda: functional.scaled_dot_product_attention(q, k, v, enable_gqa=True), 20)
        emit(kind="peer_kernel", name=name, rows=batch, context=context, us=seconds * 1e6)
    for rows in (1, 64, 256):
        x = torch.randn(rows, 4096, device="cuda", dtype=torch.bfloat16)
        weights = [torch.randn(16384, 4096, device="cuda", dtype=torch.bfloat16) for _ in range(4)]
        seconds = median_seconds(torch, lambda: [functional.linear(x, w) for w in weights], 20) / len(weights)
        emit(kind="peer_kernel", name="torch, matmul fc1", rows=rows, us=seconds * 1e6)


PEERS = {"torch, recorded steps": torch_loop, "torch, sdpa": torch_kernels,
         "transformers, continuous batching": transformers_batching, "torch, compiled steps": torch_compiled_loop,
         "flashinfer, paged decode": flashinfer_kernels, "llama.cpp": llama_cpp}


def main():
    for name in sys.argv[2:] or PEERS:
        try:
            PEERS[name](name, sys.argv[1])
        except Missing as why:
            emit(kind="skipped", name=name, why=str(why))
        except Exception as error:  # a peer's own trouble is no reason to lose the others
            emit(kind="skipped", name=name, why=f"{type(error).__name__}: {error}"[:300])
    return 0


if __name__ == "__main__":
    sys.exit(main())
