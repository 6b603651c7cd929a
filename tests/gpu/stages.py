"""The stages of the GPU test: what each runs, and what it makes of that. run.py says when.

A stage gets a Context, hands each result to context.emit as soon as it has it (so that what comes after cannot lose it),
and raises StageError when it could not do what it is for.
"""
import importlib.util
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import machine

HERE = pathlib.Path(__file__).resolve().parent
MODEL_BYTES = {"8b": 16_545_000_000, "8b-4-layers": 2_070_000_000}


class StageError(Exception):
    """What a stage could not do, in one line."""


def skip(context, name, why):
    """The record of something that cannot be measured here; a stage of nothing else is tried again."""
    context.emit({"kind": "skipped", "name": name, "why": why})


def stop(process):
    """Ends a process and what it started."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    try:
        process.communicate(timeout=10)
    except subprocess.TimeoutExpired:
        pass  # it hangs in the driver; nothing more can be done from here


class Context:
    """Where things are, how a stage runs programs, and what it has measured so far."""

    def __init__(self, bundle, out, work, shape, backend):
        self.bundle, self.out, self.work = (pathlib.Path(p).resolve() for p in (bundle, out, work))
        self.shape, self.backend = shape, backend
        self.results = {}  # of the stages before, by name: their records
        self.log, self.records, self.deadline = None, [], float("inf")

    def begin(self, log, deadline):
        self.log, self.records, self.deadline = log, [], deadline

    def emit(self, record):
        self.records.append(record)

    def find(self, kind, **fields):
        """The first record of a kind with these fields, of this stage or one before; None when there is none."""
        for records in (self.records, *self.results.values()):
            for record in records:
                if record.get("kind") == kind and all(record.get(key) == value for key, value in fields.items()):
                    return record
        return None

    def environment(self, **more):
        """The bundle's libraries, for its own programs only: the machine's have their own."""
        return {**os.environ, "LD_LIBRARY_PATH": machine.loader_path(self.bundle),
                "MINITRON_GPU_CACHE_DIR": str(self.work), **more}

    def command(self, program, *arguments):
        return [str(self.bundle / "bin" / program), *map(str, arguments)]

    def start(self, command, environment=None, output=subprocess.PIPE):
        self.log.write(f"$ {' '.join(map(str, command))}\n")
        self.log.flush()
        try:
            return subprocess.Popen(command, cwd=self.bundle, env=environment or self.environment(), text=True,
                                    stdin=subprocess.DEVNULL, stdout=output, stderr=self.log, start_new_session=True)
        except OSError as error:
            raise StageError(f"{command[0]}: {error.strerror}") from None

    def time_left(self, most_s):
        return max(1.0, min(most_s, self.deadline - time.monotonic()))

    def finish(self, process, timeout_s):
        """Waits for a process; returns its output and, if it did not end well, why."""
        name, timeout_s = os.path.basename(process.args[0]), self.time_left(timeout_s)
        try:
            text, why = process.communicate(timeout=timeout_s)[0], ""
        except subprocess.TimeoutExpired as expired:
            stop(process)
            text, why = expired.stdout or "", f"{name} took more than {timeout_s:.0f} s"
        text = text.decode(errors="replace") if isinstance(text, bytes) else text
        self.log.write(text)
        if not why and process.returncode != 0:
            why = f"{name} ended with status {process.returncode}"
        return text, why

    def run(self, command, timeout_s, environment=None):
        """Runs a command; returns what it wrote to standard output."""
        text, why = self.finish(self.start(command, environment), timeout_s)
        if why:
            raise StageError(why)
        return text

    def measure(self, command, timeout_s, environment=None):
        """Runs a command and takes the JSON lines it prints as records, also those before an end that is not good."""
        text, why = self.finish(self.start(command, environment), timeout_s)
        for line in text.splitlines():
            if line.startswith("{"):
                try:
                    self.emit(json.loads(line))
                except ValueError:
                    pass  # cut off
        if why:
            raise StageError(why)

    def model(self, shape):
        """The folder of a random checkpoint, made when it is asked for; in memory where there is room."""
        if shape == "tiny":
            return self.bundle / "deploy" / "models" / "minitron-tiny"
        num_bytes = MODEL_BYTES[shape]
        for folder in {pathlib.Path("/dev/shm"), self.work, pathlib.Path("/tmp"), pathlib.Path("/var/tmp")}:
            if (folder / f"minitron-gpu-{shape}" / "complete").exists():
                return folder / f"minitron-gpu-{shape}"
        room = machine.model_room(num_bytes, self.work)
        if room is None:
            raise StageError(f"no folder has room for a model of {num_bytes / 1e9:.1f} GB")
        folder = room / f"minitron-gpu-{shape}"
        folder.mkdir(parents=True, exist_ok=True)
        begin = time.monotonic()
        self.run(self.command("minitron-make-checkpoint", shape, folder), 120)
        (folder / "complete").touch()
        self.emit({"kind": "checkpoint", "shape": shape, "seconds": time.monotonic() - begin, "folder": str(room)})
        return folder


# --- What the device is, and whether the kernels are right. ---


def device(context):
    found = machine.run_probe(context.bundle)
    record = {"kind": "device", **found}
    if machine.find_program("nvidia-smi") is not None:
        fields = ("name", "driver_version", "memory.total", "clocks.max.sm", "clocks.max.mem", "clocks.sm",
                  "temperature.gpu", "power.limit")
        try:
            text = context.run([machine.find_program("nvidia-smi"), f"--query-gpu={','.join(fields)}",
                                "--format=csv,noheader,nounits"], 20, dict(os.environ))
            values = [value.strip() for value in (text.splitlines() or [""])[0].split(",")]
            record.update({field.replace(".", "_"): value for field, value in zip(fields, values)})
        except StageError as why:  # the driver's own answer will do
            record["nvidia_smi"] = str(why)
    if "name" not in record:
        raise StageError(record.get("nvidia_smi") or found.get("error") or "no device and no nvidia-smi")
    context.emit(record)


def run_tests(context, name, tests):
    """Tests of cuda_tests_gpu, as several processes: most of their time is the references', on the host."""
    shards = max(1, min(8, os.cpu_count() or 1))
    begin = time.monotonic()
    command = context.command("cuda_tests_gpu", "--gtest_brief=1", f"--gtest_filter={tests}")
    started = [context.start(command, context.environment(GTEST_TOTAL_SHARDS=str(shards), GTEST_SHARD_INDEX=str(shard)))
               for shard in range(shards)]
    ends = [context.finish(process, 200) for process in started]
    passed = sum(int(count) for text, _ in ends for count in re.findall(r"^\[  PASSED  \] (\d+) test", text, re.M))
    failed = sorted({test for text, _ in ends for test in re.findall(r"^\[  FAILED  \] ([\w./]+)", text, re.M)})
    context.emit({"kind": "test", "name": name, "passed": passed, "failed": failed,
                  "seconds": time.monotonic() - begin})
    why = next((why for _, why in ends if why), "" if passed else "no test was run")
    if why:
        raise StageError(f"{why}{': ' if failed else ''}{', '.join(failed[:4])}")


RUNNER_TESTS = "CudaRunnerTest.*:CudaMemoryTest.*:CudaFp8Test.*"


def kernels(context):
    """The kernel tests of the emulation, compiled for the device."""
    run_tests(context, "kernels", f"-{RUNNER_TESTS}")


def model(context):
    """The runner over cublasLt: the same bits in any batch, and the CPU backend's tokens."""
    run_tests(context, "runner", RUNNER_TESTS)


def sanitizer(context):
    """The kernels under compute-sanitizer, smallest cases, where the machine has it and lets it run."""
    program = machine.find_program("compute-sanitizer")
    if program is None:
        return skip(context, "sanitizer", "no compute-sanitizer here")
    cases = "RowKernelsTest.LayerNormRows*:*EveryGroupSize*:*FewerBlocks*:*Rope*:*FewRows*:*EqualLogits*"
    for tool in ("memcheck", "racecheck"):
        text, why = context.finish(context.start(
            [program, "--tool", tool, "--error-exitcode", "9",
             *context.command("cuda_tests_gpu", "--gtest_brief=1", f"--gtest_filter={cases}")]), 100)
        if "Device not supported" in text:
            return skip(context, "sanitizer", "compute-sanitizer does not support this machine")
        if why:
            raise StageError(f"{tool}: {why}")
        context.emit({"kind": "sanitizer", "tool": tool})
    return None


def score(context, which, tokens, ways):
    """Logprobs of the lines of a file, by the way they were made."""
    text = context.run(context.command("minitron-gpu-bench", "score", which, context.backend, tokens, ",".join(ways)), 60)
    records = [json.loads(line) for line in text.splitlines() if line.startswith("{")]
    return [[{key: record[key] for key in ("logprobs", "top")} for record in records if record["how"] == way]
            for way in ways]


def compare_bits(context, what, first, second):
    """Whether two scores are the same, to the bit; and by how much not."""
    largest = max(abs(a - b) for x, y in zip(first, second, strict=True)
                  for a, b in zip(x["logprobs"], y["logprobs"], strict=True))
    context.emit({"kind": "bits", "what": what, "same": first == second, "largest_nats": largest})
    return "" if first == second else f"{what}: up to {largest:.4f} nat apart"


def layers(context):
    """Four layers of full width: the same bits however the rows are batched, and from weights made on the device as from
    the file's; and logprobs against another implementation on the same weights."""
    shape = "tiny" if context.shape == "tiny" else "8b-4-layers"
    folder = context.model(shape)
    vocab = json.loads((folder / "config.json").read_text())["vocab_size"]
    rows = [[(7919 * row + 104729 * column) % vocab for column in range(64)] for row in range(16)]
    tokens, scores = context.work / "tokens.txt", context.work / "scores.json"
    tokens.write_text("\n".join(" ".join(map(str, row)) for row in rows) + "\n")
    alone, together, steps = score(context, folder, tokens, ("alone", "together", "steps"))
    differences = [compare_bits(context, "prompts alone and in one batch", alone, together),
                   compare_bits(context, "prompts and decode steps", alone, steps)]
    if context.backend == "cuda":
        (made,) = score(context, f"random:{shape}", tokens, ("alone",))
        differences.append(compare_bits(context, "weights from a file and made on the device", alone, made))
    if importlib.util.find_spec("torch") is None:
        skip(context, "layers", "no torch here, which the other implementation needs")
    else:
        scores.write_text(json.dumps(alone))
        check = [sys.executable, str(HERE / "layers_check.py"), str(folder), str(tokens), str(scores)]
        context.measure(check, 90, dict(os.environ))
    if any(differences):
        raise StageError("; ".join(filter(None, differences)))


# --- Kernels and steps. ---


def ceilings(context):
    context.measure(context.command("minitron-gpu-bench", "ceilings", context.shape), 60)


def roofline(context):
    context.measure(context.command("minitron-gpu-bench", "roofline", context.shape), 120)


def steps_of(*formats, points="full"):
    """Decode steps and prompts of the whole model, without a server. Bf16 weights are made on the device."""
    def steps(context):
        tiny = context.shape == "tiny"
        made_there = formats[0] == "none" and context.backend == "cuda"
        if "free" in formats and not made_there:
            return skip(context, "steps-free", "products without batch invariance are for the cuda backend")
        which = f"random:{'test' if tiny else context.shape}" if made_there else context.model(context.shape)
        return context.measure(context.command("minitron-gpu-bench", "steps", which, context.backend, *formats,
                                               "small" if tiny else points), 120)
    return steps


OURS = {"decode attention": "Decode", "prefill attention": "Prefill", "norm": "LayerNorm", "squared relu": "SquaredRelu", "rope": "Rope",
        "int8": "QuantizedMatMul", "int4": "QuantizedMatMul", "fp8": "QuantizedMatMul"}
NCU_METRICS = ("Duration", "Memory Throughput", "DRAM Throughput", "Compute (SM) Throughput", "Achieved Occupancy",
               "Registers Per Thread", "L2 Hit Rate")


def worst_kernels(context, count):
    """Our kernels furthest from both ceilings in the roofline table, one of each function."""
    read, product = context.find("ceiling", name="read"), context.find("ceiling", name="bf16 GEMM")
    shares = {}
    for record in context.results.get("roofline", ()) if read and product else ():
        function = next((OURS[part] for part in OURS if part in record["name"]), None)
        if function is None or record["us"] <= 0:
            continue
        share = max(record["bytes"] / record["us"] / 1e3 / read["gb_per_s"],
                    record["flop"] / record["us"] / 1e6 / product["tflops"])
        if record["rows"] >= 64 and share < shares.get(function, (2.0,))[0]:
            shares[function] = (share, function, record)
    return sorted(shares.values(), key=lambda entry: entry[0])[:count]


def ncu(context):
    """Nsight Compute on the three worst of our kernels."""
    program = machine.find_program("ncu")
    if program is None:
        return skip(context, "ncu", "no ncu here")
    worst = worst_kernels(context, 3)
    if not worst:
        return skip(context, "ncu", "no roofline table yet to choose kernels from")
    sections = [word for name in ("SpeedOfLight", "MemoryWorkloadAnalysis", "Occupancy", "LaunchStats", "WarpStateStats")
                for word in ("--section", name)]
    for share, function, record in worst:
        context_tokens = record.get("context", 0)
        text = context.run([program, "--clock-control", "none", "--kernel-name", f"regex:{function}Kernel",
                            "--launch-skip", "1", "--launch-count", "1", *sections,
                            *context.command("minitron-gpu-bench", "kernel", context.shape, record["name"],
                                             record["rows"], context_tokens)], 60)
        metrics = {}
        for name in NCU_METRICS:
            found = re.search(rf"^\s+{re.escape(name)}\s+(\S+)\s+([\d.,]+)\s*$", text, re.MULTILINE)
            if found:
                metrics[name] = f"{found.group(2)} {found.group(1)}"
        if not metrics:
            raise StageError(f"ncu measured nothing of {function}Kernel; its output is in the log")
        context.emit({"kind": "ncu", "kernel": record["name"], "rows": record["rows"], "context": context_tokens,
                      "share": share, "metrics": metrics})
    return None


# The rest needs a server or another program: serving.py.
