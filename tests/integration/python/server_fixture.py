"""The real server as a child process, with the shipped model, on free ports; and its native API by reflection."""

import os
import pathlib
import subprocess
import tempfile
import unittest

import grpc
from google.protobuf import descriptor_pool
from google.protobuf import message_factory
from grpc_reflection.v1alpha import proto_reflection_descriptor_database

ROOT = pathlib.Path(__file__).resolve().parents[3]
BINARY = os.environ["MINITRON_TEST_SERVER"]


class Server:
    """Starts on construction; `stop` drains it and returns its exit code."""

    def __init__(self, *flags):
        self._folder = tempfile.TemporaryDirectory()
        port_file = pathlib.Path(self._folder.name) / "ports"
        self._log = []
        self._terminated = False
        self._process = subprocess.Popen(
            [BINARY, "--model", str(ROOT / "deploy/models/minitron-tiny"), "--host", "127.0.0.1", "--port", "0",
             "--metrics-port", "0", "--port-file", str(port_file), "--kv-cache-mib", "16", "--threads", "1", *flags],
            stderr=subprocess.PIPE, text=True)
        for line in self._process.stderr:
            self._log.append(line)
            if " ready grpc=" in line:
                break
        else:
            raise RuntimeError("the server did not start:\n" + "".join(self._log))
        self.ports = dict(line.split("=") for line in port_file.read_text().split())

    @property
    def address(self):
        return "127.0.0.1:" + self.ports["grpc"]

    def terminate(self):
        """Starts a drain. A second signal would end the process at once, so there is none."""
        if not self._terminated:
            self._process.terminate()
        self._terminated = True

    def stop(self):
        self.terminate()
        self._log.append(self._process.stderr.read())
        code = self._process.wait()
        self._process.stderr.close()
        self._folder.cleanup()
        return code


class NativeApi:
    """minitron.v1 without generated code: messages and methods as the server's reflection describes them."""

    def __init__(self, address):
        self._channel = grpc.insecure_channel(address)
        self._pool = descriptor_pool.DescriptorPool(
            proto_reflection_descriptor_database.ProtoReflectionDescriptorDatabase(self._channel))

    @property
    def pool(self):
        return self._pool

    def close(self):
        self._channel.close()

    def message(self, name):
        return message_factory.GetMessageClass(self._pool.FindMessageTypeByName(name))

    def call(self, service, method, request):
        descriptor = self._pool.FindServiceByName(service).FindMethodByName(method)
        response = message_factory.GetMessageClass(descriptor.output_type)
        return self._channel.unary_unary(f"/{service}/{method}", type(request).SerializeToString,
                                         response.FromString)(request)

    def generate(self, text, max_tokens, **options):
        """The native unary answer: what every other protocol must agree with."""
        request = self.message("minitron.v1.GenerateRequest")()
        self._fill(request.task, text, max_tokens, **options)
        return self.call("minitron.v1.GenerationService", "Generate", request)

    def stream(self, text, max_tokens, **options):
        """All events of the native stream."""
        request = self.message("minitron.v1.GenerateStreamRequest")()
        self._fill(request.task, text, max_tokens, **options)
        return list(self._channel.unary_stream(
            "/minitron.v1.GenerationService/GenerateStream", type(request).SerializeToString,
            self.message("minitron.v1.GenerateStreamResponse").FromString)(request))

    @staticmethod
    def _fill(task, text, max_tokens, *, seed=1, n=1, stop=(), temperature=None, logprobs=None, regex=None,
              logit_bias=None, parse_special=None):
        task.text = text
        task.stopping.max_tokens = max_tokens
        task.stopping.stop_sequences.extend(stop)
        task.sampling.seed = seed
        task.sampling.num_sequences = n
        if temperature is not None:
            task.sampling.temperature = temperature
        if logprobs is not None:
            task.output.logprobs = logprobs
        task.sampling.logit_bias.update(logit_bias or {})
        if regex is not None:
            task.constraint.regex = regex
        if parse_special is not None:
            task.tokenize_options.parse_special = parse_special


class ServerTestCase(unittest.TestCase):
    """One server for all tests of a class; at the end it must drain cleanly."""

    flags = ()

    @classmethod
    def setUpClass(cls):
        cls.server = Server(*cls.flags)
        cls.native = NativeApi(cls.server.address)

    @classmethod
    def tearDownClass(cls):
        cls.native.close()
        code = cls.server.stop()
        if code != 0:
            raise AssertionError(f"the server ended with {code}")


def require_current_client():
    """Ends the program when build/venv has another minitron_client than the tree."""
    import minitron_client

    installed = pathlib.Path(minitron_client.__file__).parent
    for source in (ROOT / "clients" / "python" / "minitron_client").glob("*.py"):
        copy = installed / source.name
        if not copy.exists() or copy.read_bytes() != source.read_bytes():
            raise SystemExit(f"{source.name} differs from the installed one: run deploy/install-deps.sh clients")
