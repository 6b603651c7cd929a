#!/usr/bin/env python3
"""A large model on this machine, through the real server: time to ready, memory, one stream over gRPC; and its speed.

    large.py [--shape 8b] [--formats bf16,int8,int4] [--ours build/release/bin] [--work build/bench] [--steps 8]

Three starts per format: the first packs the weights into a file; then with nothing of the model in memory (the page
cache is told to forget its files); then again. Needs room on disk for the checkpoint and one packed file: 32 GB for 8b.
"""
import argparse
import os
import pathlib
import shutil
import tempfile
import time

import results
import servers
import sides

START_LIMIT_S = 900
COLUMNS = (
    "", "first start, s", "cold, s", "warm, s", "resident, MiB", "of it mapped", "streamed over gRPC",
    "decode, 1 sequence, tok/s (of read)", "8 sequences", "prompt of 64 (of FMA)", "read GB/s, FMA GFLOP/s",
)  # fmt: skip
PROMPT = "To be or not to be, that is the question"


def forget(*folders: pathlib.Path) -> None:
    """Drops the pages of all files of these folders from memory; what is not on disk yet is written first."""
    os.sync()
    for path in (file for folder in folders for file in folder.iterdir() if file.is_file()):
        handle = os.open(path, os.O_RDONLY)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)


def memory_mib(pid: int, key: str) -> float:
    for line in pathlib.Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) / 1024
    raise LookupError(key)


def start(ours: pathlib.Path, model: pathlib.Path, quantize: str, cache: pathlib.Path, stream: bool) -> list[str]:
    """Seconds to ready; with `stream` also the memory then and what a stream of 16 tokens took and brought."""
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        command = servers.our_command(ours / "minitron-server", model, quantize, cache, folder)
        with servers.started(command, folder) as process:
            port, seconds = servers.wait_for_ours(process, folder, START_LIMIT_S)
            cells = [f"{seconds:.1f}"]
            if stream:
                cells += [f"{memory_mib(process.pid, 'VmRSS'):,.0f}", f"{memory_mib(process.pid, 'RssFile'):,.0f}"]
                begin = time.monotonic()
                streamed = sides.run(
                    [
                        ours / "minitron", "generate", "--server", f"127.0.0.1:{port}", "--prompt", PROMPT,
                        "--max-tokens", "16", "--ignore-eos", "--token-ids",
                    ]
                )  # fmt: skip
                cells.append(f"{len(streamed.split())} tokens in {time.monotonic() - begin:.1f} s")
            return cells


def measure(arguments: argparse.Namespace, model: pathlib.Path, weight_format: str) -> list[str]:
    quantize, cache = sides.QUANTIZE[weight_format], arguments.work / f"cache-{arguments.shape}-{weight_format}"
    shutil.rmtree(cache, ignore_errors=True)
    cache.mkdir()
    cells = []
    forget(model)
    cells += start(arguments.ours, model, quantize, cache, stream=False)
    forget(model, cache)
    cells += start(arguments.ours, model, quantize, cache, stream=False)
    cells += start(arguments.ours, model, quantize, cache, stream=True)
    output = sides.run(
        [
            arguments.ours / "minitron-bench-engine", "--model", model, "--quantize", quantize, "--cache-dir", cache,
            "--prefill", "64", "--chunk", "64", "--context", "64", "--batches", "1,8", "--steps", str(arguments.steps),
            "--repeats", "3",
        ]
    )  # fmt: skip
    for row in ("decode batch +1", "decode batch +8", "prefill +64"):
        rate, share = results.engine_rate(output, row)
        cells.append(f"{rate:.1f} ({share:.0f} %)")
    limits = results.parse_limits(output)
    cells.append(f"{limits.read:.1f}, {limits.fma:.0f}")
    shutil.rmtree(cache)
    return cells


def main() -> None:
    parser = argparse.ArgumentParser(description="A large model: time to ready, memory, a stream, speed.")
    parser.add_argument("--shape", default="8b")
    parser.add_argument("--formats", default="bf16,int8,int4")
    parser.add_argument("--ours", type=sides.absolute, default=sides.ROOT / "build/release/bin")
    parser.add_argument("--work", type=sides.absolute, default=sides.ROOT / "build/bench")
    parser.add_argument("--steps", type=int, default=8)
    arguments = parser.parse_args()
    model = arguments.work / arguments.shape
    if not (model / "model.safetensors").exists():
        model.mkdir(parents=True, exist_ok=True)
        sides.run([arguments.ours / "minitron-make-checkpoint", arguments.shape, model])
    sides.add_tokenizer(model)
    print("| " + " | ".join(COLUMNS) + " |\n" + "|---" * len(COLUMNS) + "|")
    for weight_format in arguments.formats.split(","):
        print("| " + " | ".join([weight_format, *measure(arguments, model, weight_format)]) + " |", flush=True)


if __name__ == "__main__":
    main()
