"""Servers as child processes: started, awaited, ended."""
import contextlib
import pathlib
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence

POLL_S = 0.02


@contextlib.contextmanager
def started(command: Sequence[str | pathlib.Path], folder: pathlib.Path) -> Iterator[subprocess.Popen[bytes]]:
    """A server that is told to end, and awaited, when the block is left. It logs to `folder`/log."""
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen([str(word) for word in command], stdout=log, stderr=log)
        try:
            yield process
        finally:
            process.terminate()
            process.wait()


Server = subprocess.Popen[bytes]


def wait_until(ready: Callable[[], bool], process: Server, folder: pathlib.Path, limit_s: float) -> float:
    """Polls until the server is ready and returns the seconds that took; one that ends or is late ends the program."""
    begin = time.monotonic()
    while not ready():
        if process.poll() is not None or time.monotonic() - begin > limit_s:
            sys.exit(f"{process.args} did not start:\n{(folder / 'log').read_text(errors='replace')[-3000:]}")
        time.sleep(POLL_S)
    return time.monotonic() - begin


def wait_for_ours(process: Server, folder: pathlib.Path, limit_s: float = 120) -> tuple[int, float]:
    """The gRPC port of a minitron-server with --port-file `folder`/ports, and the seconds until it was ready."""
    ports = folder / "ports"
    seconds = wait_until(lambda: ports.exists() and "grpc=" in ports.read_text(), process, folder, limit_s)
    line = next(line for line in ports.read_text().splitlines() if line.startswith("grpc="))
    return int(line.removeprefix("grpc=")), seconds


def our_command(
    program: pathlib.Path, model: pathlib.Path, quantize: str, cache: pathlib.Path, folder: pathlib.Path
) -> list[str]:
    """A minitron-server on free ports of the loopback."""
    flags = {
        "model": model, "quantize": quantize, "cache-dir": cache, "host": "127.0.0.1", "port": 0, "metrics-port": 0,
        "port-file": folder / "ports", "drain-timeout": 1,
    }  # fmt: skip
    return [str(program), *(f"--{name}={value}" for name, value in flags.items())]
