"""A client in another language: the distribution's Python gRPC, with stubs made from our protocol files.

Usage: python_client_test.py SERVER_BINARY STUBS_FOLDER
"""

import os
import signal
import subprocess
import sys
import tempfile
import unittest

import grpc

SERVER, STUBS = sys.argv[1:3]
sys.path.insert(0, STUBS)
grpc.__path__.append(os.path.join(STUBS, "grpc"))  # the stubs of grpc.health.v1 live in the library's namespace

from google.rpc import error_details_pb2, status_pb2  # noqa: E402
from grpc.health.v1 import health_pb2, health_pb2_grpc  # noqa: E402
from minitron.v1 import generation_pb2, generation_pb2_grpc  # noqa: E402


def task(**fields):
    sampling = generation_pb2.SamplingConfig(seed=1, **fields)
    stopping = generation_pb2.StoppingConfig(max_tokens=24, ignore_eos=True)
    return generation_pb2.GenerationTask(text="To be or not to be,", sampling=sampling, stopping=stopping)


class PythonClientTest(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.scratch = tempfile.TemporaryDirectory()
        cls.server = subprocess.Popen(
            [SERVER, "--host=127.0.0.1", "--port=0", "--metrics-port=0", "--threads=1",
             f"--port-file={cls.scratch.name}/ports"], stderr=subprocess.PIPE, text=True)
        for line in cls.server.stderr:
            if "ready grpc=" in line:
                break
        with open(f"{cls.scratch.name}/ports", encoding="ascii") as ports:
            port = dict(line.strip().split("=") for line in ports)["grpc"]
        cls.channel = grpc.insecure_channel(f"127.0.0.1:{port}")
        cls.generation = generation_pb2_grpc.GenerationServiceStub(cls.channel)
        cls.health = health_pb2_grpc.HealthStub(cls.channel)

    @classmethod
    def tearDownClass(cls):
        cls.channel.close()
        cls.server.send_signal(signal.SIGTERM)
        cls.server.communicate()
        cls.scratch.cleanup()
        assert cls.server.returncode == 0, cls.server.returncode

    def stream(self, request):
        return list(self.generation.GenerateStream(generation_pb2.GenerateStreamRequest(task=request)))

    def test_stream_equals_unary(self):
        events = self.stream(task())
        self.assertEqual(events[0].WhichOneof("event"), "started")
        self.assertEqual(events[-1].WhichOneof("event"), "finished")
        text = "".join(event.delta.text for event in events)
        answer = self.generation.Generate(generation_pb2.GenerateRequest(task=task()))
        self.assertEqual(answer.sequences[0].text, text)
        self.assertEqual(len(answer.sequences[0].token_ids), 24)

    def test_a_refusal_carries_its_details(self):
        with self.assertRaises(grpc.RpcError) as caught:
            self.stream(task(temperature=3.5))
        self.assertEqual(caught.exception.code(), grpc.StatusCode.INVALID_ARGUMENT)
        trailers = dict(caught.exception.trailing_metadata())
        details = status_pb2.Status.FromString(trailers["grpc-status-details-bin"]).details
        info = error_details_pb2.ErrorInfo()
        self.assertTrue(any(detail.Unpack(info) for detail in details))
        self.assertEqual(info.metadata["field"], "sampling.temperature")
        self.assertEqual((info.metadata["value"], info.metadata["limit"]), ("3.5", "2"))

    def test_a_cancelled_stream_ends(self):
        call = self.generation.GenerateStream(generation_pb2.GenerateStreamRequest(task=task()))
        next(call)
        call.cancel()
        with self.assertRaises(grpc.RpcError) as caught:
            for _ in call:
                pass
        self.assertEqual(caught.exception.code(), grpc.StatusCode.CANCELLED)

    def test_health_is_checked_and_watched(self):
        request = health_pb2.HealthCheckRequest(service="minitron.v1.GenerationService")
        self.assertEqual(self.health.Check(request).status, health_pb2.HealthCheckResponse.SERVING)
        watch = self.health.Watch(request)
        self.assertEqual(next(watch).status, health_pb2.HealthCheckResponse.SERVING)
        watch.cancel()
        with self.assertRaises(grpc.RpcError) as caught:
            self.health.Check(health_pb2.HealthCheckRequest(service="nobody"))
        self.assertEqual(caught.exception.code(), grpc.StatusCode.NOT_FOUND)


if __name__ == "__main__":
    unittest.main(argv=sys.argv[:1])
