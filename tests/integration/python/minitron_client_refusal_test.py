"""minitron_client when calls are refused: security, full queues, drains, and retries against a scripted server."""

import concurrent.futures
import hashlib
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import threading
import unittest

import grpc
import minitron_client
from google.protobuf import any_pb2, duration_pb2
from google.rpc import code_pb2, error_details_pb2, status_pb2
from minitron.v1 import generation_pb2, generation_pb2_grpc
from minitron_client import Client, ClientOptions, HealthStatus, RetryPolicy, Tls

import server_fixture
from minitron_client_fixture import Blocking, texts_of

PROMPT = "To be or not to be,"


class QueueTest(unittest.TestCase):

    def test_a_full_queue_is_typed_with_its_delay(self):
        server = server_fixture.Server("--max-queued-requests", "1", "--max-num-sequences", "1")
        with Client(server.address, ClientOptions(retry=RetryPolicy(attempts=1))) as client, \
                concurrent.futures.ThreadPoolExecutor(8) as pool:
            stream = client.stream(PROMPT, max_tokens=1000, ignore_eos=True)
            next(stream)
            calls = [pool.submit(client.generate, PROMPT, max_tokens=1) for _ in range(8)]  # one runs, one waits
            concurrent.futures.wait(calls, return_when=concurrent.futures.FIRST_EXCEPTION)
            stream.cancel()
        refusals = [call.exception() for call in calls if call.exception()]
        self.assertTrue(refusals)
        for error in refusals:
            self.assertIsInstance(error, minitron_client.UnavailableError)
            self.assertEqual(error.reason, "QUEUE_FULL")
            self.assertGreater(error.retry_delay, 0)
        with Client(server.address, ClientOptions(retry=RetryPolicy(attempts=1000))) as client, \
                concurrent.futures.ThreadPoolExecutor(8) as pool:  # who tries again gets through
            list(pool.map(lambda _: client.generate(PROMPT, max_tokens=1), range(8)))
        self.assertEqual(server.stop(), 0)


class SecurityTest(unittest.TestCase):

    @classmethod
    def setUpClass(cls):
        folder = tempfile.TemporaryDirectory()
        cls.addClassCleanup(folder.cleanup)
        cls.folder = pathlib.Path(folder.name)
        for name in ("ca", "client"):  # the server's certificate is its own authority; so is the client's
            cls.make_pair(name)
        digest = lambda token: hashlib.sha256(token.encode()).hexdigest()
        (cls.folder / "auth.json").write_text(json.dumps({
            "tenants": {"alice": {"tokens_per_minute": 100}},
            "tokens": [{"id": "a", "sha256": digest("alice-token"), "tenant": "alice", "roles": ["user"]}]}))
        cls.server = server_fixture.Server(
            "--tls-cert", str(cls.folder / "ca.pem"), "--tls-key", str(cls.folder / "ca.key"),
            "--tls-client-ca", str(cls.folder / "client.pem"), "--auth-file", str(cls.folder / "auth.json"))

    @classmethod
    def make_pair(cls, name):
        subprocess.run(
            ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2",
             "-subj", f"/CN={name}", "-addext", "subjectAltName=DNS:server.test,IP:127.0.0.1",
             "-keyout", cls.folder / f"{name}.key", "-out", cls.folder / f"{name}.pem"], check=True, stderr=subprocess.DEVNULL)

    @classmethod
    def tearDownClass(cls):
        if cls.server.stop() != 0:
            raise AssertionError("the server did not drain")

    def client(self, token="alice-token", certificate=True):
        read = lambda name: (self.folder / name).read_bytes()
        tls = Tls(read("ca.pem"), *((read("client.key"), read("client.pem")) if certificate else ()),
                  server_name="server.test")
        return Client(self.server.address, ClientOptions(
            tls=tls, token=token, retry=RetryPolicy(attempts=1), timeout=60))

    def test_tls_with_a_client_certificate_and_a_token(self):
        with self.client() as client:
            self.assertEqual(client.models()[0].name, "minitron-tiny")

    def test_the_readme_s_code_for_it(self):
        text = (server_fixture.ROOT / "clients" / "python" / "README.md").read_text()
        (block,) = [block for block in text.split("```python\n")[1:] if "inference.example" in block.split("```")[0]]
        code = block.split("```")[0].replace('"..."', '"alice-token"')
        done = subprocess.run([sys.executable, "-B", "-c", code.replace("inference.example:443", self.server.address)],
                              cwd=self.folder, capture_output=True, text=True, check=False)
        self.assertEqual((done.returncode, done.stdout), (0, "minitron-tiny\n"), done.stderr)

    def test_without_the_certificate_there_is_no_connection(self):
        with self.client(certificate=False) as client, self.assertRaises(minitron_client.UnavailableError):
            client.models()

    def test_missing_and_unknown_tokens_and_roles(self):
        for token, reason in ((None, "NO_TOKEN"), ("guess", "UNKNOWN_TOKEN")):
            with self.client(token) as client, self.assertRaises(minitron_client.UnauthenticatedError) as raised:
                client.models()
            self.assertEqual(raised.exception.reason, reason)
        with self.client() as client:
            for call in (client.load, client.server_info, client.drain, lambda: client.cancel("a")):
                with self.assertRaises(minitron_client.PermissionDeniedError) as raised:
                    call()
                self.assertEqual(raised.exception.reason, "ROLE_MISSING")
            self.assertEqual(client.health(), HealthStatus.SERVING)  # nothing was drained

    def test_a_quota_is_typed(self):
        with self.client() as client, self.assertRaises(minitron_client.ResourceExhaustedError) as raised:
            client.generate(PROMPT, max_tokens=500)
        self.assertEqual(raised.exception.reason, "QUOTA_EXCEEDED")
        self.assertTrue(raised.exception.quota_violations)

    def program(self, variable, *arguments, code=0, certificate=True, token="alice-token"):
        (self.folder / "token").write_text(token + "\n")
        own = ("--tls-cert", self.folder / "client.pem", "--tls-key", self.folder / "client.key") if certificate else ()
        result = subprocess.run(
            [os.environ[variable], *arguments, "--tls-ca", self.folder / "ca.pem", *own,
             "--tls-server-name", "server.test", "--token-file", self.folder / "token", "--timeout", "60"],
            capture_output=True, text=True, check=False)
        self.assertEqual(result.returncode, code, result.stderr)
        return result

    def test_the_programs_speak_tls_with_certificates_and_tokens(self):
        models = ("MINITRON_TEST_CLI", "models", "--server", self.server.address)
        self.assertIn("minitron-tiny", self.program(*models).stdout)
        refused = self.program(*models, certificate=False, code=24)
        self.assertIn("--tls-cert", refused.stderr)
        refused = self.program(*models, token="guess", code=26)
        self.assertIn("--token-file", refused.stderr)
        self.assertNotIn("guess", refused.stderr)
        for protocol in ("native", "vllm", "oip"):
            run = json.loads(self.program(
                "MINITRON_TEST_BENCH", "--server", self.server.address, "--protocol", protocol, "--model",
                "minitron-tiny", "--num-prompts", "2", "--concurrency", "1", "--input-len", "5", "--output-len", "2", "--json", "--quiet").stdout)
            self.assertEqual((run["completed"], run["total_output_tokens"]), (2, 4), protocol)

    def test_a_program_that_does_not_encrypt_is_told_how(self):
        result = subprocess.run([os.environ["MINITRON_TEST_CLI"], "models", "--server", self.server.address],
                                capture_output=True, text=True, check=False)
        self.assertEqual(result.returncode, 24)
        self.assertIn("--tls", result.stderr)

    def test_secrets_are_not_in_the_text_of_options(self):
        options = ClientOptions(token="alice-token", tls=Tls(None, b"key-bytes", b"chain"))
        self.assertNotIn("alice-token", repr(options))
        self.assertNotIn("key-bytes", repr(options))
        with self.assertRaises(ValueError):
            Tls(private_key=b"alone")


class CountingPolicy(RetryPolicy):

    def wait(self, error, attempt):
        self.__dict__.setdefault("reasons", []).append(error.reason)
        return super().wait(error, attempt)


class DrainTest(unittest.TestCase):

    def test_a_draining_server_is_left_for_the_next(self):
        """Calls go in turn to two servers, one of which drains: none fails, and the stream that runs ends complete."""
        for make_client in (Client, Blocking):
            leaving, staying = server_fixture.Server(), server_fixture.Server()
            policy = CountingPolicy(attempts=10)
            with make_client(leaving.address) as one, make_client(
                    f"ipv4:{leaving.address},{staying.address}",
                    ClientOptions(retry=policy, channel_options=[
                        ("grpc.service_config", '{"loadBalancingConfig": [{"round_robin": {}}]}')])) as both:
                stream = one.stream(PROMPT, max_tokens=800, n=2, seed=1, ignore_eos=True)
                next(stream)
                for _ in range(4):
                    both.tokenize("a")
                leaving.terminate()
                events = []
                for event in stream:
                    events.append(event)
                    if "DRAINING" not in policy.__dict__.get("reasons", ()):
                        self.assertEqual(len(both.generate("a", max_tokens=1).sequences), 1)
                self.assertIn("DRAINING", policy.reasons)
                self.assertEqual(sum(event.HasField("finished") for event in events), 2)
                both.generate("a", max_tokens=1)
            self.assertEqual((leaving.stop(), staying.stop()), (0, 0))

    def test_a_drain_that_a_client_asks_for(self):
        """The watch tells, new requests are refused by reason, what runs ends complete, and the server exits cleanly."""
        for make_client in (Client, Blocking):
            server = server_fixture.Server()
            with make_client(server.address, ClientOptions(retry=RetryPolicy(attempts=1))) as client:
                watch, stream = client.watch_health(), client.stream(PROMPT, max_tokens=800, n=2, ignore_eos=True)
                self.assertEqual(next(watch), HealthStatus.SERVING)
                next(stream)
                self.assertIsNone(client.drain())
                self.assertEqual(next(watch), HealthStatus.NOT_SERVING)
                with self.assertRaises(minitron_client.UnavailableError) as raised:
                    while True:  # not serving is said first: what comes until it refuses is still answered
                        client.generate(PROMPT, max_tokens=1)
                self.assertEqual(raised.exception.reason, "DRAINING")
                self.assertEqual(sum(event.HasField("finished") for event in stream), 2)
            self.assertEqual(server.stop(), 0)

    def test_a_server_that_leaves_for_good_is_unavailable(self):
        for make_client in (Client, Blocking):
            server = server_fixture.Server()
            with make_client(server.address, ClientOptions(retry=RetryPolicy(2, 0.001))) as client:
                client.tokenize("a")
                self.assertEqual(server.stop(), 0)
                self.assertRaises(minitron_client.UnavailableError, client.tokenize, "a")


class Scripted(generation_pb2_grpc.GenerationServiceServicer):
    """Answers each call by the next step of a script: a status with trailers, or how many events before UNAVAILABLE."""

    def __init__(self, *steps):
        self.steps = list(steps)
        self.calls = 0

    def _next(self, context):
        self.calls += 1
        step = self.steps.pop(0) if self.steps else "answer"
        if isinstance(step, dict):
            context.set_trailing_metadata(tuple(step.get("trailers", ())))
            context.abort(step.get("code", grpc.StatusCode.UNAVAILABLE), "scripted")
        return step

    def Generate(self, request, context):
        self._next(context)
        return generation_pb2.GenerateResponse(sequences=[generation_pb2.GeneratedSequence(text="yes")])

    def GenerateStream(self, request, context):
        step = self._next(context)
        yield generation_pb2.GenerateStreamResponse(started=generation_pb2.Started(seed=1))
        if step == "break":
            context.abort(grpc.StatusCode.UNAVAILABLE, "after the first event")
        yield generation_pb2.GenerateStreamResponse(delta=generation_pb2.Delta(text="yes"))


def details(*messages, code=code_pb2.UNAVAILABLE):
    status = status_pb2.Status(code=code, message="scripted")
    for message in messages:
        packed = any_pb2.Any()
        packed.Pack(message)
        status.details.append(packed)
    return ("grpc-status-details-bin", status.SerializeToString())


class RetryTest(unittest.TestCase):
    """What no real server does on demand, from a scripted one."""

    def serve(self, *steps):
        server = grpc.server(concurrent.futures.ThreadPoolExecutor(4))
        scripted = Scripted(*steps)
        generation_pb2_grpc.add_GenerationServiceServicer_to_server(scripted, server)
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        self.addCleanup(lambda: server.stop(None).wait())
        return scripted, f"127.0.0.1:{port}"

    def both(self, steps, check, **policy):
        policy = {"attempts": 3, "initial_delay": 0.001, **policy}
        for make_client in (Client, Blocking):
            for call in ("generate", "stream"):
                scripted, address = self.serve(*steps)
                with make_client(address, ClientOptions(retry=RetryPolicy(**policy), timeout=60)) as client:
                    check(scripted, (lambda c=client: c.generate("a").sequences[0].text) if call == "generate" else
                          (lambda c=client: texts_of(c.stream("a"))[0]))

    def test_unavailable_before_the_first_event_is_tried_again(self):
        def check(scripted, call):
            self.assertEqual(call(), "yes")
            self.assertEqual(scripted.calls, 3)
        self.both([{}, {}], check)

    def test_the_attempts_end(self):
        def check(scripted, call):
            self.assertRaises(minitron_client.UnavailableError, call)
            self.assertEqual(scripted.calls, 3)
        self.both([{}] * 9, check)

    def test_pushback_is_taken_before_retry_info_and_the_own_wait(self):
        """The own wait and RetryInfo would outlast the deadline, so an answer proves that pushback was taken."""
        retry_info = error_details_pb2.RetryInfo(retry_delay=duration_pb2.Duration(seconds=1000))

        def check(scripted, call):
            self.assertEqual(call(), "yes")
            self.assertEqual(scripted.calls, 2)
        self.both([{"trailers": [("grpc-retry-pushback-ms", "1"), details(retry_info)]}], check,
                  initial_delay=1000, max_delay=1000)

    def test_a_negative_or_broken_pushback_forbids_a_retry(self):
        def check(scripted, call):
            self.assertRaises(minitron_client.UnavailableError, call)
            self.assertEqual(scripted.calls, 1)
        for value in ("-1", "soon"):
            self.both([{"trailers": [("grpc-retry-pushback-ms", value)]}], check)

    def test_a_wait_beyond_the_deadline_is_not_begun(self):
        retry_info = error_details_pb2.RetryInfo(retry_delay=duration_pb2.Duration(seconds=1000))

        def check(scripted, call):
            with self.assertRaises(minitron_client.UnavailableError) as raised:
                call()
            self.assertEqual((scripted.calls, raised.exception.retry_delay), (1, 1000))
        self.both([{"trailers": [details(retry_info)]}], check)

    def test_other_statuses_are_not_retried_and_have_their_classes(self):
        classes = {
            "CANCELLED": "CancelledError", "UNKNOWN": "InternalError", "INVALID_ARGUMENT": "InvalidArgumentError",
            "DEADLINE_EXCEEDED": "DeadlineExceededError", "NOT_FOUND": "NotFoundError",
            "ALREADY_EXISTS": "AlreadyExistsError", "PERMISSION_DENIED": "PermissionDeniedError",
            "RESOURCE_EXHAUSTED": "ResourceExhaustedError", "FAILED_PRECONDITION": "FailedPreconditionError",
            "ABORTED": "FailedPreconditionError", "OUT_OF_RANGE": "InvalidArgumentError",
            "UNIMPLEMENTED": "UnimplementedError", "INTERNAL": "InternalError", "DATA_LOSS": "InternalError",
            "UNAUTHENTICATED": "UnauthenticatedError"}
        info = error_details_pb2.ErrorInfo(reason="WHY", domain="minitron", metadata={"field": "a.b", "limit": "2"})
        for name, wanted in classes.items():
            code = grpc.StatusCode[name]

            def check(scripted, call):
                with self.assertRaises(minitron_client.MinitronError) as raised:
                    call()
                error = raised.exception
                self.assertIs(type(error), getattr(minitron_client, wanted), name)
                self.assertEqual((error.code, error.reason, error.field, scripted.calls), (code, "WHY", "a.b", 1))
            self.both([{"code": code, "trailers": [details(info, code=code.value[0])]}], check)

    def test_details_that_are_no_message_are_left_out(self):
        def check(scripted, call):
            with self.assertRaises(minitron_client.InternalError) as raised:
                call()
            self.assertEqual((raised.exception.reason, raised.exception.message), ("", "scripted"))
        self.both([{"code": grpc.StatusCode.INTERNAL, "trailers": [("grpc-status-details-bin", b"\xff\xff")]}], check)

    def test_never_after_an_event(self):
        for make_client in (Client, Blocking):
            scripted, address = self.serve("break")
            with make_client(address, ClientOptions(retry=RetryPolicy(initial_delay=0.001), timeout=60)) as client:
                stream = client.stream("a")
                self.assertEqual(next(stream).started.seed, 1)
                for _ in range(2):
                    self.assertRaises(minitron_client.UnavailableError, next, stream)
            self.assertEqual(scripted.calls, 1)

    def test_cancel_ends_a_wait(self):
        scripted, address = self.serve({"trailers": [("grpc-retry-pushback-ms", "1000000")]})
        with Client(address) as client:
            stream = client.stream("a")
            reader = concurrent.futures.ThreadPoolExecutor(1)
            answer = reader.submit(next, stream)
            while scripted.calls < 1:
                pass
            threading.Thread(target=stream.cancel).start()
            self.assertRaises(minitron_client.CancelledError, answer.result)
            reader.shutdown()
        self.assertEqual(scripted.calls, 1)


if __name__ == "__main__":
    server_fixture.require_current_client()
    unittest.main()
