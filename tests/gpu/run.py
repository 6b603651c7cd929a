#!/usr/bin/env python3
"""Runs the stages of the GPU test and prints the table of its results.

    run.py [--bundle DIR] [--out DIR] [--budget SECONDS] [--shape 8b|tiny] [STAGE...]

A stage leaves OUT/STAGE.json (what it measured) and OUT/STAGE.log. One that passed is skipped the next time; name it
with --redo to repeat it. A stage that no longer fits into the budget is left for the next run. Nothing but the standard
library.
"""
import argparse
import importlib.util
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time

import report

HERE = pathlib.Path(__file__).resolve().parent


class StageError(Exception):
    """What a stage could not do, in one line."""


def skipped(name, why):
    """The record of something that cannot be measured here; a stage of nothing else is tried again."""
    return {"kind": "skipped", "name": name, "why": why}


def reasons(path):
    """Why a stage's file holds no result; empty when it holds one."""
    records = json.loads(path.read_text())["records"]
    return [record["why"] for record in records] if all(r["kind"] == "skipped" for r in records) else []


class Context:
    """Where things are, and how a stage runs programs."""

    def __init__(self, options):
        self.bundle = pathlib.Path(options.bundle).resolve()
        self.out = pathlib.Path(options.out).resolve()
        self.shape = options.shape
        self.backend = options.backend
        self.log = None

    def environment(self):
        """The bundle's libraries, for its own programs only: the machine's have their own."""
        return {**os.environ, "LD_LIBRARY_PATH": f"{self.bundle / 'lib'}:{os.environ.get('LD_LIBRARY_PATH', '')}"}

    def command(self, program, *arguments):
        return [str(self.bundle / "bin" / program), *map(str, arguments)]

    def run(self, command, timeout_s, environment=None):
        """Runs a command, its output in the stage's log too; returns what it wrote to standard output."""
        self.log.write(f"$ {' '.join(command)}\n")
        self.log.flush()
        try:
            result = subprocess.run(command, cwd=self.bundle, env=environment or self.environment(), text=True,
                                    stdout=subprocess.PIPE, stderr=self.log, timeout=timeout_s)
        except subprocess.TimeoutExpired:
            raise StageError(f"{command[0]} took more than {timeout_s} s") from None
        except OSError as error:
            raise StageError(f"{command[0]}: {error.strerror}") from None
        self.log.write(result.stdout)
        if result.returncode != 0:
            raise StageError(f"{os.path.basename(command[0])} ended with status {result.returncode}")
        return result.stdout

    def records(self, command, timeout_s, environment=None):
        """The JSON lines a program prints."""
        lines = self.run(command, timeout_s, environment).splitlines()
        return [json.loads(line) for line in lines if line.startswith("{")]

    def model(self, shape):
        """The folder of a random checkpoint, made when it is asked for."""
        if shape == "tiny":
            return self.bundle / "deploy" / "models" / "minitron-tiny"
        folder = self.out / f"model-{shape}"
        if not (folder / "complete").exists():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            self.run(self.command("minitron-make-checkpoint", shape, folder), 180)
            (folder / "complete").touch()
        return folder


def device(context):
    text = context.run(["nvidia-smi", "--query-gpu=name,driver_version,memory.total,clocks.max.sm,clocks.max.mem",
                        "--format=csv,noheader,nounits"], 30, dict(os.environ))
    name, driver, memory, sm_clock, memory_clock = [field.strip() for field in text.splitlines()[0].split(",")]
    return [{"kind": "device", "name": name, "driver": driver, "memory_mib": float(memory), "sm_mhz": float(sm_clock),
             "memory_mhz": float(memory_clock)}]


def kernels(context):
    """The kernel tests of the emulation, compiled for the device."""
    context.run(context.command("cuda_tests_gpu", "--gtest_brief=1", "--gtest_filter=-CudaRunnerTest.*:CudaMemoryTest.*:CudaFp8Test.*"), 240)
    return [{"kind": "test", "name": "kernels"}]


def sanitizer(context):
    """The same under compute-sanitizer, smallest cases, where the machine has it and lets it run."""
    program = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not os.path.exists(program):
        return [skipped("sanitizer", "no compute-sanitizer here")]
    cases = "RowKernelsTest.LayerNormRows*:*EveryGroupSize*:*FewerBlocks*:*Rope*:*FewRows*:*EqualLogits*"
    records = []
    for tool in ("memcheck", "racecheck"):
        context.run([program, "--tool", tool, "--error-exitcode", "9",
                     *context.command("cuda_tests_gpu", "--gtest_brief=1", f"--gtest_filter={cases}")], 200)
        records.append({"kind": "sanitizer", "tool": tool})
    return records


def model(context):
    """The runner over cublasLt: the same bits in any batch, and the CPU backend's tokens."""
    context.run(context.command("cuda_tests_gpu", "--gtest_brief=1", "--gtest_filter=CudaRunnerTest.*:CudaMemoryTest.*:CudaFp8Test.*"), 240)
    return [{"kind": "test", "name": "runner"}]


def ceilings(context):
    return context.records(context.command("minitron-gpu-bench", "ceilings", context.shape), 60)


def roofline(context):
    return context.records(context.command("minitron-gpu-bench", "roofline", context.shape), 150)


def layers(context):
    """Four layers of full width against another implementation on the same weights."""
    if importlib.util.find_spec("torch") is None:
        return [skipped("layers", "no torch here, which the other implementation needs")]
    shape = "tiny" if context.shape == "tiny" else "8b-4-layers"
    folder = context.model(shape)
    tokens = context.out / "tokens.txt"
    vocab = json.loads((folder / "config.json").read_text())["vocab_size"]
    rows = [[(7919 * row + 104729 * column) % vocab for column in range(64)] for row in range(16)]
    tokens.write_text("\n".join(" ".join(map(str, row)) for row in rows) + "\n")
    scores = context.out / "scores.json"
    scores.write_text(json.dumps(context.records(
        context.command("minitron-gpu-bench", "score", folder, context.backend, tokens), 120)))
    check = [sys.executable, str(HERE / "layers_check.py"), str(folder), str(tokens), str(scores)]
    return context.records(check, 120, dict(os.environ))


def steps(context):
    """Decode steps and prompts of the whole model, without a server."""
    records = []
    for formats in (["none", "bf16", "plain"], ["none", "bf16", "early"], ["fp8", "fp8", "plain"],
                    ["fp8-dynamic", "fp8", "plain"], ["int8", "bf16", "plain"], ["int4", "bf16", "plain"]):
        if context.backend == "cpu" and "fp8" in formats:
            continue
        model_folder = context.model(context.shape)
        records += context.records(
            context.command("minitron-gpu-bench", "steps", model_folder, context.backend, *formats), 180)
    return records


class Server:
    """minitron-server for the length of a with statement."""

    def __init__(self, context, *flags):
        self.context, self.flags = context, flags

    def __enter__(self):
        ports = self.context.out / "ports"
        ports.unlink(missing_ok=True)
        begin = time.monotonic()
        self.process = subprocess.Popen(
            self.context.command("minitron-server", "--backend", self.context.backend, "--host", "127.0.0.1",
                                 "--port", 0, "--metrics-port", 0, "--drain-delay", 0, "--port-file", ports,
                                 *self.flags),
            cwd=self.context.bundle, env=self.context.environment(), stdout=self.context.log, stderr=self.context.log)
        while not (ports.exists() and "grpc=" in ports.read_text()):
            if self.process.poll() is not None:
                raise StageError(f"the server ended with status {self.process.returncode} before it was ready")
            if time.monotonic() - begin > 180:
                self.process.kill()
                raise StageError("the server was not ready after 180 s")
            time.sleep(0.05)
        self.ready_s = time.monotonic() - begin
        self.address = "127.0.0.1:" + re.search(r"^grpc=(\d+)$", ports.read_text(), re.MULTILINE).group(1)
        return self

    def __exit__(self, *_):
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise StageError("the server did not end") from None


def serve(context):
    """The server streams a completion to the command line."""
    with Server(context, "--model", context.model("tiny")) as server:
        text = context.run(context.command("minitron", "generate", "--server", server.address, "--prompt",
                                           "To be or not to be,", "--max-tokens", 64, "--seed", 7), 60)
    if not text.strip():
        raise StageError("the completion is empty")
    return [{"kind": "ready", "shape": "tiny", "seconds": server.ready_s}]


def load(context):
    """Closed loops over gRPC."""
    if context.shape == "tiny":
        points = [(1, 16, 8), (4, 16, 8)]
    else:
        points = [(c, 512, 128) for c in (1, 8, 32, 64, 128, 256)] + [(64, 128, 512), (64, 1000, 250)]
    flags = ["--model", context.model(context.shape), "--max-num-sequences", 256, "--max-step-tokens", 2048,
             "--max-prefill-chunk", 2048]
    with Server(context, *flags) as server:
        records = [{"kind": "ready", "shape": context.shape, "seconds": server.ready_s}]
        for clients, prompt, output in points:
            records += context.records(
                context.command("minitron-gpu-load", server.address, clients, prompt, output, 2 * clients), 120)
    return records


def peers(context):
    """Other engines on the same shapes in the same run."""
    return context.records([sys.executable, str(HERE / "peers.py"), str(context.model(context.shape))], 150,
                           dict(os.environ))


# In order; the seconds are what a stage is given before it is not started any more.
STAGES = {"device": (device, 5), "kernels": (kernels, 30), "ceilings": (ceilings, 15), "model": (model, 60),
          "roofline": (roofline, 60), "layers": (layers, 45), "steps": (steps, 120), "serve": (serve, 15),
          "load": (load, 90), "peers": (peers, 90), "sanitizer": (sanitizer, 60)}


def run_stage(context, name):
    """Runs one stage; writes its JSON when it passed. Returns whether it did."""
    begin = time.monotonic()
    error = None
    with open(context.out / f"{name}.log", "w", encoding="utf-8") as context.log:
        try:
            records = STAGES[name][0](context)
        except (StageError, OSError, ValueError, KeyError) as caught:
            error = f"{caught}"
            context.log.write(f"failed: {error}\n")
    seconds = time.monotonic() - begin
    if error is None:
        temporary = context.out / f"{name}.json.tmp"
        temporary.write_text(json.dumps({"stage": name, "seconds": seconds, "records": records}, indent=1))
        temporary.rename(context.out / f"{name}.json")
    why = [] if error is not None else reasons(context.out / f"{name}.json")
    if error is not None:
        print(f"gpu: {name} FAILED in {seconds:.0f} s: {error}; see {context.out / name}.log", flush=True)
    elif why:
        print(f"gpu: {name} skipped: {'; '.join(why)}", flush=True)
    else:
        print(f"gpu: {name} passed in {seconds:.0f} s", flush=True)
    return error is None


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    bundle = HERE if (HERE / "bin").exists() else HERE.parents[1] / "build" / "gpu-bundle"
    parser.add_argument("--bundle", default=bundle)
    parser.add_argument("--out", default=os.environ.get("OUT", "minitron-gpu"))
    parser.add_argument("--budget", type=float, default=600)
    parser.add_argument("--shape", choices=["8b", "tiny"], default="8b")
    parser.add_argument("--backend", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--redo", action="append", default=[])
    parser.add_argument("stages", nargs="*")
    options = parser.parse_args()
    unknown = [name for name in options.stages + options.redo if name not in STAGES]
    if unknown:
        parser.error(f"no stage {unknown[0]}; there are {', '.join(STAGES)}")
    context = Context(options)
    context.out.mkdir(parents=True, exist_ok=True)
    begin, failed = time.monotonic(), 0
    for name in options.stages or STAGES:
        done = context.out / f"{name}.json"
        if name in options.redo:
            done.unlink(missing_ok=True)
        if done.exists() and not reasons(done):
            print(f"gpu: {name} passed before ({done})")
            continue
        if time.monotonic() - begin + STAGES[name][1] > options.budget:
            print(f"gpu: {name} left for the next run: {options.budget:.0f} s are nearly over")
            continue
        failed += not run_stage(context, name)
    print(report.write(context.out))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
