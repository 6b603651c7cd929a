"""What the tests of deploy/ share: the real server as a child, calls without generated stubs, one thread of it frozen."""
import ctypes
import os
import pathlib
import signal
import subprocess
import tempfile
import time
import urllib.request

import grpc

ROOT = pathlib.Path(__file__).resolve().parents[2]
SERVER = os.environ.get("MINITRON_TEST_SERVER", str(ROOT / "build/release/bin/minitron-server"))


def wait_for(what, condition, timeout=60.0):
    """Polls until condition() is true; a failure names what was waited for. The limit is for a machine that is broken."""
    end = time.monotonic() + timeout
    while time.monotonic() < end:
        value = condition()
        if value:
            return value
        time.sleep(0.02)
    raise AssertionError(f"waited {timeout} s for {what}")


class Server:
    """minitron-server on free ports of the loopback. Use as a context manager."""

    def __init__(self, *flags, env=None, preexec=None):
        self.folder = tempfile.TemporaryDirectory(prefix="minitron_test_")
        self.ports_file = pathlib.Path(self.folder.name) / "ports"
        self.log_file = pathlib.Path(self.folder.name) / "log"
        command = [SERVER, "--host=127.0.0.1", "--port=0", "--metrics-port=0", "--threads=1", "--kv-cache-mib=64",
                   f"--port-file={self.ports_file}", *flags]
        clean = {k: v for k, v in os.environ.items() if not k.startswith("MINITRON_SERVER_")}
        with open(self.log_file, "wb") as log:
            self.process = subprocess.Popen(command, stderr=log, env={**clean, **(env or {})}, preexec_fn=preexec)
        self.pid = self.process.pid

    def __enter__(self):
        wait_for("the port file", lambda: self.ports_file.exists() or self.process.poll() is not None)
        if not self.ports_file.exists():
            raise AssertionError(f"the server ended with {self.process.poll()}: {self.log()}")
        ports = dict(line.split("=") for line in self.ports_file.read_text().split())
        self.port, self.metrics_port, self.health_port = (int(ports[k]) for k in ("grpc", "metrics", "health"))
        self.address = f"127.0.0.1:{self.port}"
        return self

    def __exit__(self, *_):
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self.folder.cleanup()

    def log(self):
        return self.log_file.read_text(errors="replace")

    def stop(self, timeout=60):
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout)

    def metrics(self):
        with urllib.request.urlopen(f"http://127.0.0.1:{self.metrics_port}/metrics", timeout=20) as answer:
            return answer.read().decode()

    def metric(self, name, **labels):
        """The sum of the series of this name with these labels."""
        total = 0.0
        for line in self.metrics().splitlines():
            series, _, value = line.rpartition(" ")
            if series.partition("{")[0] == name and all(f'{k}="{v}"' in series for k, v in labels.items()):
                total += float(value)
        return total

    def rss(self):
        return int(pathlib.Path(f"/proc/{self.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")

    def cpu_seconds(self):
        fields = pathlib.Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def descriptors(self):
        return len(os.listdir(f"/proc/{self.pid}/fd"))

    def threads(self):
        """CPU ticks by thread id."""
        result = {}
        for task in pathlib.Path(f"/proc/{self.pid}/task").iterdir():
            try:
                fields = (task / "stat").read_text().rpartition(")")[2].split()
                result[int(task.name)] = int(fields[11]) + int(fields[12])
            except OSError:
                pass
        return result


def varint(value):
    out = bytearray()
    while True:
        out.append((value & 0x7F) | (0x80 if value > 0x7F else 0))
        value >>= 7
        if not value:
            return bytes(out)


def field(number, value):
    """One protobuf field: an int as varint, bytes or str with a length."""
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    data = value.encode() if isinstance(value, str) else value
    return varint(number << 3 | 2) + varint(len(data)) + data


def generate_request(text="To be or not to be,", max_tokens=16, request_id="", logprobs=0):
    """minitron.v1.GenerateStreamRequest (GenerateRequest has the same shape): greedy, no end before max_tokens."""
    # Fields of GenerationTask: 2 request_id, 3 text, 5 sampling{1 temperature}, 6 stopping{1 max_tokens, 6 ignore_eos}.
    task = field(3, text) + field(5, b"\x0d\x00\x00\x00\x00") + field(6, field(1, max_tokens) + field(6, 1))
    if request_id:
        task += field(2, request_id)
    if logprobs:
        task += field(7, field(2, logprobs))  # output{2 logprobs}: makes messages large
    return field(1, task)


def stream(channel, request, metadata=(), timeout=60):
    """Calls GenerateStream; an iterator of raw messages, and a call object."""
    method = channel.unary_stream("/minitron.v1.GenerationService/GenerateStream")
    return method(request, metadata=metadata, timeout=timeout)


def ends_complete(messages):
    """Whether the last message is `finished` (field 3 of GenerateStreamResponse)."""
    return bool(messages) and messages[-1][:1] == b"\x1a"


def health(address, service=""):
    """SERVING is 1. Raises grpc.RpcError when nobody answers."""
    with grpc.insecure_channel(address) as channel:
        answer = channel.unary_unary("/grpc.health.v1.Health/Check")(field(1, service) if service else b"", timeout=20)
        return answer[1] if len(answer) == 2 else 0


class FrozenThread:
    """One thread of another process, stopped where it is (ptrace), as if a driver call never returned."""

    SEIZE, INTERRUPT, DETACH = 0x4206, 0x4207, 17

    def __init__(self, tid):
        self.tid = tid
        self.libc = ctypes.CDLL(None, use_errno=True)

    def call(self, request):
        if self.libc.ptrace(request, self.tid, None, None) != 0:
            raise OSError(ctypes.get_errno(), "ptrace")

    def __enter__(self):
        self.call(self.SEIZE)
        self.call(self.INTERRUPT)
        os.waitpid(self.tid, 0x40000000)  # __WALL
        return self

    def wait_for_death(self):
        """The process cannot end before its tracer has seen this thread end."""
        os.waitpid(self.tid, 0x40000000)

    def __exit__(self, *_):
        self.libc.ptrace(self.DETACH, self.tid, None, None)


def busiest_thread(server, channel):
    """The engine's thread: the one that works while a request runs."""
    before = server.threads()
    for _ in range(4):
        list(stream(channel, generate_request(max_tokens=200)))
    after = server.threads()
    return max(after, key=lambda tid: after[tid] - before.get(tid, 0))
