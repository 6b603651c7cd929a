"""The stages that run the server, and the peers."""
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import machine
from stages import HERE, StageError, skip, stop


class Server:
    """minitron-server for the length of a with statement."""

    def __init__(self, context, *flags):
        self.context, self.flags = context, flags

    def __enter__(self):
        context, ports = self.context, self.context.work / "ports"
        ports.unlink(missing_ok=True)
        begin = time.monotonic()
        self.process = context.start(
            context.command("minitron-server", "--backend", context.backend, "--host", "127.0.0.1", "--port", 0,
                            "--metrics-port", 0, "--drain-timeout", 1, "--port-file", ports, *self.flags),
            output=context.log)
        most_s = context.time_left(120)
        while not (ports.exists() and "grpc=" in ports.read_text()):
            if self.process.poll() is not None:
                raise StageError(f"the server ended with status {self.process.returncode} before it was ready")
            if time.monotonic() - begin > most_s:
                stop(self.process)
                raise StageError(f"the server was not ready after {most_s:.0f} s")
            time.sleep(0.02)
        self.ready_s = time.monotonic() - begin
        self.address = "127.0.0.1:" + re.search(r"^grpc=(\d+)$", ports.read_text(), re.MULTILINE).group(1)
        return self

    def __exit__(self, kind, *_):
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            stop(self.process)
            if kind is None:
                raise StageError("the server did not end") from None


class Watch:
    """nvidia-smi beside the length of a with statement: how busy the device was, and at which clocks."""

    def __init__(self, context, what):
        self.context, self.what = context, what

    def __enter__(self):
        program = machine.find_program("nvidia-smi")
        self.process = None if program is None else subprocess.Popen(
            [program, "--query-gpu=utilization.gpu,clocks.sm,power.draw", "--format=csv,noheader,nounits", "-lms", "250"],
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, start_new_session=True)

    def __exit__(self, *_):
        if self.process is None:
            return
        self.process.terminate()
        try:
            text = self.process.communicate(timeout=5)[0]
        except subprocess.TimeoutExpired:
            return stop(self.process)
        rows = []
        for line in text.splitlines():
            try:
                rows.append([float(value) for value in line.split(",")])
            except ValueError:
                continue  # a value it does not have
        rows = [row for row in rows if len(row) == 3]
        if rows:
            busy, clock, power = (sum(column) / len(rows) for column in zip(*rows))
            self.context.emit({"kind": "gpu", "what": self.what, "busy_percent": busy, "sm_mhz": clock,
                               "watts": power, "samples": len(rows)})


def serve(context):
    """The server streams a completion to the command line."""
    with Server(context, "--model", context.model("tiny")) as server:
        text = context.run(context.command("minitron", "generate", "--server", server.address, "--prompt",
                                           "To be or not to be,", "--max-tokens", 64, "--seed", 7), 60)
    if not text.strip():
        raise StageError("the completion is empty")
    context.emit({"kind": "ready", "shape": "tiny", "seconds": server.ready_s})


def load_flags(context, *formats, cache=None):
    """Room for 256 sequences of 4,096 tokens, and for all of them to wait at once."""
    return ["--model", context.model(context.shape), "--cache-dir", cache or context.work, "--max-num-sequences", 256,
            "--max-step-tokens", 2048, "--max-prefill-chunk", 2048, "--max-queued-requests", 1024,
            "--max-queued-tokens", 1 << 22, "--max-queued-mib", 256, *formats]


def measure_load(context, server, weights, points):
    """One point that fails does not take the others."""
    failures = []
    for mode, load, prompt, output, extent in points:
        what, before = f"{mode} {load}, {prompt}/{output}", len(context.records)
        try:
            with Watch(context, f"{weights}, {what}"):
                context.measure(context.command("minitron-gpu-load", mode, server.address, load, prompt, output, extent),
                                90)
        except StageError as why:
            failures.append(f"{what}: {why}")
        for record in context.records[before:]:
            record["weights"] = weights
    if failures:
        raise StageError("; ".join(failures))


# Output tokens per second with every slot taken, at the shapes of the targets: mode, clients, prompt, output, seconds.
STEADY = [("steady", 256, 128, 2048, 8), ("steady", 256, 1000, 1000, 8), ("steady", 256, 2048, 2048, 8)]
CLOSED = [("closed", clients, 512, 128, 2 * clients) for clients in (1, 8, 32, 64, 128, 256)] + [
    ("closed", 64, 128, 128, 128)]
POISSON = [("poisson", rate, 512, 128, 8) for rate in (4, 16, 32)]
TINY = {"steady": [("steady", 4, 8, 8, 0.2)], "closed": [("closed", 1, 16, 8, 2), ("closed", 4, 16, 8, 8)],
        "poisson": [("poisson", 20, 16, 8, 0.3)]}


def points(context, name, full):
    return TINY[name] if context.shape == "tiny" else full


def load(context):
    """Clients over gRPC: the targets' shapes, and how long a start takes with the weights in the page cache, with and
    without the products' timed choices."""
    cache = context.work / "first-start"  # without the choices that stages before have made
    shutil.rmtree(cache, ignore_errors=True)
    cache.mkdir()
    flags = load_flags(context, cache=cache)
    with Server(context, *flags) as server:
        context.emit({"kind": "ready", "shape": context.shape, "start": "first", "seconds": server.ready_s})
    with Server(context, *flags) as server:
        context.emit({"kind": "ready", "shape": context.shape, "start": "second", "seconds": server.ready_s})
        measure_load(context, server, "bf16", points(context, "steady", STEADY))


def load_fp8(context):
    if context.backend == "cpu":
        return skip(context, "load-fp8", "fp8 is for the cuda backend")
    with Server(context, *load_flags(context, "--quantize", "fp8", "--kv-cache-dtype", "fp8")) as server:
        context.emit({"kind": "ready", "shape": context.shape, "start": "fp8", "seconds": server.ready_s})
        measure_load(context, server, "fp8", points(context, "steady", STEADY))
    return None


def closed(context):
    """Each client sends its next request when its last has ended: 1 to 256 of them."""
    with Server(context, *load_flags(context)) as server:
        measure_load(context, server, "bf16", points(context, "closed", CLOSED))


def poisson(context):
    """Requests that come by themselves, at three rates."""
    with Server(context, *load_flags(context)) as server:
        measure_load(context, server, "bf16", points(context, "poisson", POISSON))


def peers(context):
    """Other engines on the same weights and shapes, each in a process of its own."""
    import peers as others  # after sys.path is set
    folder, failures = context.model(context.shape), []
    for name in others.PEERS:
        try:
            context.measure([sys.executable, str(HERE / "peers.py"), str(folder), name], 75, dict(os.environ))
        except StageError as why:  # a peer's own trouble is no reason to lose the others
            failures.append(name)
            skip(context, name, str(why))
    if context.deadline - time.monotonic() < 1 and failures:
        raise StageError(f"no time left for {', '.join(failures)}")
