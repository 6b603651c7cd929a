#!/usr/bin/env python3
"""Our engine beside llama.cpp's (or a relative's) on this machine: whole models, the same shapes, cores and threads.

    compare.py --peer BUILD_DIR [--ours build/release/bin] [--work build/bench] [--name llama.cpp] [--pairs 5]
               [--target AVX2] [--formats bf16,int8,int4] [--architecture nemotron] [--cores 0,1] [--steps 16]
               [--repeats 3] [--flip 1.2] [--log FILE] [-- FLAGS OF llama-batched-bench]
    compare.py --show FILE... [--name llama.cpp] [--flip 1.2]

Each pair is one run of either side, in alternating order, with the limits of the machine probed before, between and
after. Pairs are appended to --log as JSON as they come; --show makes the table of several such files. --target
restricts ours to an instruction set; BUILD_DIR must then hold a peer built for the same.
"""
import argparse
import sys

import results
import sides


def run_peer(both: sides.Sides, weight_format: str, arguments: argparse.Namespace) -> results.Rates:
    """-pps: the eight sequences share one prompt, which spares the peer seven, not us."""
    flags = [
        "-t", both.threads, "-tb", both.threads, "-c", 4096, "-b", 512, "-ub", 512, "-npp", 128,
        "-ntg", arguments.steps, "-pps",
    ]  # fmt: skip
    batches = ["-npl", ",".join(["1"] * arguments.repeats + ["8"] * arguments.repeats)]
    program = both.peer / "llama-batched-bench"
    command = [program, "-m", both.gguf(weight_format), *map(str, flags), *batches, *arguments.peer_flags]
    return results.parse_batched_bench(both.run(command, with_log=True))  # ik_llama.cpp logs its table


def run_ours(both: sides.Sides, weight_format: str, arguments: argparse.Namespace) -> results.Rates:
    output = both.engine(
        "--model", both.checkpoint(), "--quantize", sides.QUANTIZE[weight_format], "--cache-dir", both.work / "cache",
        "--prefill", "128", "--context", "128", "--steps", str(arguments.steps), "--batches", "1,8",
        "--repeats", str(arguments.repeats),
    )  # fmt: skip
    return results.parse_engine(output)


def run_pair(both: sides.Sides, weight_format: str, number: int, arguments: argparse.Namespace) -> results.Pair:
    probes = [both.probe()]
    rates = {}
    for side in ("peer", "ours") if number % 2 == 0 else ("ours", "peer"):
        rates[side] = (run_peer if side == "peer" else run_ours)(both, weight_format, arguments)
        probes.append(both.probe())
    return results.Pair(weight_format, rates["ours"], rates["peer"], tuple(probes))


def parse_arguments() -> argparse.Namespace:
    words, peer_flags = sys.argv[1:], []
    if "--" in words:
        at = words.index("--")
        words, peer_flags = words[:at], words[at + 1 :]
    parser = argparse.ArgumentParser(description="Our engine beside a peer's, in pairs of runs.")
    parser.add_argument("--peer", type=sides.absolute, help="the peer's build folder")
    parser.add_argument("--ours", type=sides.absolute, default=sides.ROOT / "build/release/bin")
    parser.add_argument("--work", type=sides.absolute, default=sides.ROOT / "build/bench")
    parser.add_argument("--name", default="llama.cpp")
    parser.add_argument("--architecture", choices=("nemotron", "llama"), default="nemotron")
    parser.add_argument("--target", default="")
    parser.add_argument("--cores", default="0,1")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--formats", default="bf16,int8,int4")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--flip", type=float, default=1.2)
    parser.add_argument("--log", type=sides.absolute)
    parser.add_argument("--show", type=sides.absolute, nargs="+")
    arguments = parser.parse_args(words)
    arguments.peer_flags = peer_flags
    arguments.formats = arguments.formats.split(",")
    if unknown := set(arguments.formats) - set(results.FORMATS):
        parser.error(f"--formats: {', '.join(sorted(unknown))} is none of {', '.join(results.FORMATS)}")
    if not arguments.show and not arguments.peer:
        parser.error("--peer or --show is needed")
    return arguments


def main() -> None:
    arguments = parse_arguments()
    pairs = []
    if arguments.show:
        lines = [line for file in arguments.show for line in file.read_text().splitlines()]
        pairs = [results.from_json(line) for line in lines]
    else:
        both = sides.Sides(
            arguments.ours, arguments.peer / "bin", arguments.work, arguments.architecture, arguments.target,
            arguments.cores, arguments.threads,
        )  # fmt: skip
        sides.prepare(both, arguments.formats)
        for number in range(arguments.pairs):
            for weight_format in arguments.formats:
                pairs.append(run_pair(both, weight_format, number, arguments))
                if arguments.log:
                    with arguments.log.open("a") as log:
                        log.write(results.to_json(pairs[-1]) + "\n")
    print(results.table(pairs, arguments.name, arguments.flip))


if __name__ == "__main__":
    main()
