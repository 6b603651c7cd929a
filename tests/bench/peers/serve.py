#!/usr/bin/env python3
"""Our server (int8) beside llama-server (Q8_0): 8 streaming clients at once, 128-token prompts, 64 new tokens each.

    serve.py --peer BUILD_DIR [--ours build/release/bin] [--work build/bench] [--runs 3] [--cores 0,1]
             [--max-step-tokens N]

Both servers have the same cores and threads, run one after the other and are asked over loopback by minitron-bench,
ours through gRPC, llama-server through HTTP. Every run has prompts and a server of its own, warmed up by one request.
"""
import argparse
import pathlib
import tempfile
import urllib.error
import urllib.request

import results
import servers
import sides

CLIENTS, PROMPT, OUTPUT = 8, 128, 64
VOCABULARY = 32000
START_LIMIT_S = 120


def load(both: sides.Sides, folder: pathlib.Path, seed: int, *arguments: str) -> results.Served:
    """The clients: all requests at once, after one that only warms up."""
    out = folder / "result.jsonl"
    sides.run(
        [
            both.ours / "minitron-bench", *arguments, "--concurrency", str(CLIENTS), "--num-prompts", str(CLIENTS),
            "--input-len", str(PROMPT), "--output-len", str(OUTPUT), "--warmup", "1", "--seed", str(seed), "--quiet",
            "--result", out, "--detailed",
        ]
    )  # fmt: skip
    return results.parse_served(out.read_text().splitlines()[-1])


def serve_ours(both: sides.Sides, seed: int, step_tokens: int) -> results.Served:
    sides.add_tokenizer(both.checkpoint())
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        program, cache = both.ours / "minitron-server", both.work / "cache"
        command = [
            "taskset", "-c", both.cores, *servers.our_command(program, both.checkpoint(), "int8", cache, folder),
            f"--threads={both.threads}", f"--max-step-tokens={step_tokens}",
            f"--max-prefill-chunk={min(256, step_tokens)}",
        ]  # fmt: skip
        with servers.started(command, folder) as process:
            port, _ = servers.wait_for_ours(process, folder)
            return load(both, folder, seed, "--server", f"127.0.0.1:{port}")


def serve_peer(both: sides.Sides, seed: int, port: int) -> results.Served:
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        command = [
            "taskset", "-c", both.cores, both.peer / "llama-server", "-m", both.gguf("int8"), "-t", str(both.threads),
            "-tb", str(both.threads), "-np", str(CLIENTS), "-c", str(CLIENTS * 512),
            "--host", "127.0.0.1", "--port", str(port),
        ]  # fmt: skip

        def healthy() -> bool:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1) as answer:
                    return bool(answer.status == 200)
            except (urllib.error.URLError, OSError):
                return False

        with servers.started(command, folder) as process:
            servers.wait_until(healthy, process, folder, START_LIMIT_S)
            return load(
                both, folder, seed, "--server", f"127.0.0.1:{port}", "--protocol", "openai", "--model", "any",
                "--vocab-size", str(VOCABULARY),
            )  # fmt: skip


def chunk_seconds(both: sides.Sides, step_tokens: int) -> float:
    """What a step full of prompt tokens takes."""
    output = both.engine(
        "--model", both.checkpoint(), "--quantize", "int8", "--cache-dir", both.work / "cache",
        "--prefill", str(step_tokens), "--chunk", str(step_tokens), "--batches", "1", "--steps", "1",
    )  # fmt: skip
    return step_tokens / results.engine_rate(output, f"prefill +{step_tokens}")[0]


def main() -> None:
    parser = argparse.ArgumentParser(description="Our server beside llama-server, 8 clients at once.")
    parser.add_argument("--peer", type=sides.absolute, required=True)
    parser.add_argument("--ours", type=sides.absolute, default=sides.ROOT / "build/release/bin")
    parser.add_argument("--work", type=sides.absolute, default=sides.ROOT / "build/bench")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--cores", default="0,1")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--port", type=int, default=18080, help="of llama-server, which cannot pick a free one")
    parser.add_argument("--max-step-tokens", type=int, default=512, help="of ours")
    arguments = parser.parse_args()
    both = sides.Sides(
        arguments.ours, arguments.peer / "bin", arguments.work, "nemotron", "", arguments.cores, arguments.threads
    )
    sides.prepare(both, ["int8"])
    chunk = chunk_seconds(both, arguments.max_step_tokens)
    ours, peer = [], []
    for seed in range(arguments.runs):
        ours.append(serve_ours(both, seed, arguments.max_step_tokens))
        peer.append(serve_peer(both, seed, arguments.port))
    print(results.served_table(ours, peer, "llama-server", chunk))


if __name__ == "__main__":
    main()
