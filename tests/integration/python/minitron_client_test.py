"""The Python package minitron_client, as pip installs it, against the real server."""

import asyncio
import concurrent.futures
import inspect
import json
import re
import subprocess
import sys
import unittest

import grpc
import minitron_client
from minitron_client import Client, ClientOptions, HealthStatus, RetryPolicy

import server_fixture
from minitron_client_fixture import Blocking, texts_of

PROMPT = "To be or not to be,"
MULTI_BYTE = "Grüße,  你好 🙂\n"


class CallTests:
    """What both clients do; `make_client` says which."""

    def setUp(self):
        self.client = self.make_client(self.server.address)
        self.addCleanup(self.client.__exit__, None, None, None)

    def wait_until_idle(self):
        while self.client.load().running_sequences + self.client.load().active_calls > 0:
            pass

    def refused(self, kind, call, *args, **kwargs):
        with self.assertRaises(kind) as raised:
            call(*args, **kwargs)
        self.assertIs(type(raised.exception), kind)
        return raised.exception

    def test_a_generation_is_the_native_one(self):
        answer = self.client.generate(PROMPT, max_tokens=24, seed=1, n=2, stop=["the"], temperature=0.9)
        native = self.native.generate(PROMPT, 24, seed=1, n=2, stop=["the"], temperature=0.9)
        self.assertEqual([s.text for s in answer.sequences], [s.text for s in native.sequences])

    def test_concatenated_stream_is_the_unary_answer(self):
        for options in ({"n": 3}, {"stop": "the"}, {"stop": ["e", "zzz"], "include_stop": True, "n": 2},
                        {"temperature": 1.6, "n": 2}, {"logit_bias": {5: 4.0}, "logprobs": 2, "ignore_eos": True}):
            for prompt in (PROMPT, MULTI_BYTE, [501, 1209, 712]):
                arguments = {"max_tokens": 24, "seed": 3, **options}
                answer = self.client.generate(prompt, **arguments)
                with self.client.stream(prompt, **arguments) as stream:
                    events = list(stream)
                self.assertEqual(events[0].WhichOneof("event"), "started")
                self.assertEqual(sum(event.HasField("finished") for event in events), options.get("n", 1))
                self.assertEqual(texts_of(events), [s.text for s in answer.sequences])
                for sequence in answer.sequences:
                    self.assertEqual([i for e in events if e.delta.index == sequence.index for i in e.delta.token_ids],
                                     list(sequence.token_ids))

    def test_characters_of_several_bytes_arrive_whole(self):
        tokens = list(self.client.tokenize("🙂你").token_ids)
        self.assertGreater(len(tokens), 2)  # bytes, not characters: a token alone is no text
        bias = {token: 60.0 for token in tokens}
        answer = self.client.generate(MULTI_BYTE, max_tokens=40, seed=2, logit_bias=bias)
        with self.client.stream(MULTI_BYTE, max_tokens=40, seed=2, logit_bias=bias) as stream:
            self.assertEqual(texts_of(stream), [answer.sequences[0].text])

    def test_stop_strings_end_the_text_and_are_named(self):
        whole = self.client.generate(PROMPT, max_tokens=24, temperature=0).sequences[0].text
        stop = whole[5:9]
        sequence = self.client.generate(PROMPT, max_tokens=24, temperature=0, stop=stop).sequences[0]
        self.assertEqual(sequence.text, whole[:whole.index(stop)])
        self.assertEqual(sequence.finished.stop_sequence, stop)

    def test_constraints_hold(self):
        choices = ["never", "always"]
        self.assertIn(self.client.generate(PROMPT, choices=choices, seed=1).sequences[0].text, choices)
        self.assertRegex(self.client.generate(PROMPT, regex="[0-9]{3}", seed=1).sequences[0].text, r"\A[0-9]{3}\Z")
        schema = {"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"],
                  "additionalProperties": False}
        self.assertIn(json.loads(self.client.generate(PROMPT, json_schema=schema, seed=1).sequences[0].text)["ok"],
                      (True, False))
        json.loads(self.client.generate(PROMPT, json_object=True, seed=1, logit_bias=self.closing()).sequences[0].text)
        with self.assertRaises(TypeError):
            self.client.generate(PROMPT, regex="a", choices=["a"])

    def closing(self):
        """Likes what ends an object, so that the text is short."""
        return {token: 50.0 for token in self.client.tokenize("}").token_ids}

    def test_score_tokenize_detokenize_models_load(self):
        score = self.client.score("To be or not", " to be", top_logprobs=2)
        context = list(self.client.tokenize("To be or not").token_ids)
        whole = list(self.client.tokenize("To be or not to be").token_ids)
        by_tokens = self.client.score(context, whole[len(context):])
        self.assertEqual(score.total_logprob, by_tokens.total_logprob)
        self.assertLess(score.total_logprob, 0)
        self.assertEqual(len(score.positions[0].top), 2)
        tokenized = self.client.tokenize(MULTI_BYTE)
        self.assertIn("🙂".encode(), b"".join(tokenized.token_bytes))
        self.assertEqual(self.client.detokenize(tokenized.token_ids), MULTI_BYTE)
        bos = self.client.tokenize("a", add_bos=True).token_ids
        self.assertEqual(list(bos[1:]), list(self.client.tokenize("a").token_ids))
        (model,) = self.client.models()
        self.assertEqual((model.name, bos[0]), ("minitron-tiny", model.bos_token_id))
        self.assertFalse(self.client.load().draining)

    def test_server_info_is_the_native_one(self):
        info = self.client.server_info()
        native = self.native.call("minitron.v1.AdminService", "GetServerInfo",
                                  self.native.message("minitron.v1.GetServerInfoRequest")())
        for name in ("version", "backend", "model", "kv_block_size", "kv_blocks", "max_running_sequences",
                     "max_step_tokens", "max_queued_requests", "max_context_tokens"):
            self.assertEqual(getattr(info, name), getattr(native, name), name)
        self.assertEqual((info.model, info.kv_blocks), ("minitron-tiny", self.client.load().kv_blocks))
        self.assertGreater(info.kv_blocks, 0)

    def test_an_operator_cancels_by_name(self):
        options = {"max_tokens": 1000, "n": 4, "ignore_eos": True}
        streams = [self.client.stream(PROMPT, request_id=name, **options) for name in ("one", "two", "three")]
        for stream in streams:
            next(stream)
        self.assertEqual(self.client.cancel("one"), 1)
        self.assertEqual(self.client.cancel(["two", "nobody"]), 1)
        for stream in streams[:2]:
            with self.assertRaises(minitron_client.CancelledError):
                while True:
                    next(stream)
        self.assertEqual(next(streams[2]).WhichOneof("event"), "delta")  # who was not named goes on
        streams[2].cancel()
        self.wait_until_idle()
        error = self.refused(minitron_client.InvalidArgumentError, self.client.cancel, ["name"] * 1025)
        self.assertEqual(error.field, "request_ids")

    def test_health_is_told_and_watched(self):
        service = "minitron.v1.GenerationService"
        self.assertEqual([self.client.health(), self.client.health(service)], [HealthStatus.SERVING] * 2)
        self.refused(minitron_client.NotFoundError, self.client.health, "nobody")
        for name, status in (("", HealthStatus.SERVING), (service, HealthStatus.SERVING),
                             ("nobody", HealthStatus.SERVICE_UNKNOWN)):
            with self.client.watch_health(name) as watch:
                self.assertEqual(next(watch), status)
                watch.cancel()
                with self.assertRaises(minitron_client.CancelledError):
                    next(watch)

    def test_cancel_frees_the_request(self):
        stream = self.client.stream(PROMPT, max_tokens=1000, n=4, ignore_eos=True)
        next(stream)
        self.assertGreater(self.client.load().active_calls, 0)
        stream.cancel()
        with self.assertRaises(minitron_client.CancelledError):
            while True:
                next(stream)
        with self.assertRaises(minitron_client.CancelledError):  # what is cut never looks complete
            next(stream)
        self.wait_until_idle()

    def test_leaving_the_block_frees_the_request(self):
        with self.client.stream(PROMPT, max_tokens=1000, n=4, ignore_eos=True) as stream:
            next(stream)
        self.wait_until_idle()

    def test_wrong_fields_are_named(self):
        for call in (self.client.generate, lambda *a, **k: next(self.client.stream(*a, **k))):
            error = self.refused(minitron_client.InvalidArgumentError, call, PROMPT, temperature=3.5)
            self.assertEqual((error.field, error.reason), ("sampling.temperature", "INVALID_FIELD"))
            self.assertEqual((error.metadata["value"], error.metadata["limit"]), ("3.5", "2"))
            self.assertIn("temperature", str(error))
            self.assertIsNone(error.retry_delay)

    def test_arguments_that_no_message_can_hold_do_not_leave_the_client(self):
        with self.assertRaises(TypeError):
            self.client.generate(PROMPT, temprature=1)
        with self.assertRaises(ValueError):
            self.client.generate(PROMPT, max_tokens=-1)

    def test_another_model_is_not_found(self):
        error = self.refused(minitron_client.NotFoundError, self.client.generate, PROMPT, model="another")
        self.assertEqual(error.reason, "MODEL_NOT_FOUND")

    def test_a_live_name_is_refused(self):
        with self.client.stream(PROMPT, max_tokens=1000, n=4, ignore_eos=True, request_id="same") as stream:
            next(stream)
            error = self.refused(minitron_client.AlreadyExistsError, self.client.generate, PROMPT, request_id="same")
        self.assertEqual(error.reason, "DUPLICATE_REQUEST_ID")
        self.wait_until_idle()

    def test_deadlines_hold(self):
        self.refused(minitron_client.DeadlineExceededError, self.client.generate, PROMPT, max_tokens=1000, n=16,
                     ignore_eos=True, timeout=0.05)
        with self.make_client(self.server.address, ClientOptions(timeout=0.05)) as client:
            self.refused(minitron_client.DeadlineExceededError, list,
                         client.stream(PROMPT, max_tokens=1000, n=16, ignore_eos=True))
            self.assertEqual(len(client.tokenize("a", timeout=30).token_ids), 1)
        self.wait_until_idle()

    def test_a_dead_address_is_unavailable_after_the_attempts(self):
        retry = RetryPolicy(attempts=3, initial_delay=0.001)
        with self.make_client("127.0.0.1:1", ClientOptions(retry=retry)) as client:
            self.refused(minitron_client.UnavailableError, client.tokenize, "a")
            self.refused(minitron_client.UnavailableError, list, client.stream("a"))


class BothClientsTest(unittest.TestCase):

    def test_they_have_the_same_calls_with_the_same_arguments(self):
        names = {name for name, value in vars(Client).items() if name[0] != "_" and callable(value)}
        self.assertEqual(names, {name for name in vars(minitron_client.AsyncClient) if name[0] != "_"})
        for name in names:
            signatures = [inspect.signature(getattr(kind, name)) for kind in (Client, minitron_client.AsyncClient)]
            self.assertEqual(*[list(signature.parameters.values()) for signature in signatures], name)
            self.assertTrue(getattr(Client, name).__doc__, name)
        self.assertEqual(list(inspect.signature(Client.score).parameters)[:3], ["self", "context", "target"])

    def test_a_wait_of_any_attempt_is_within_its_bounds(self):
        error = minitron_client.UnavailableError(grpc.StatusCode.UNAVAILABLE, "")
        policy = RetryPolicy(attempts=1 << 20)
        for attempt in (1, 2, 100, 1100, 1 << 19):
            longest = min(policy.max_delay, policy.initial_delay * 2 ** min(attempt - 1, 10))
            self.assertTrue(longest / 2 <= policy.wait(error, attempt) <= longest, attempt)


class BlockingClientTest(CallTests, server_fixture.ServerTestCase):

    make_client = Client

    def test_threads_share_a_client(self):
        wanted = [self.client.generate(PROMPT, max_tokens=8, seed=seed).sequences[0].text for seed in range(4)]
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            texts = list(pool.map(lambda i: self.client.generate(PROMPT, max_tokens=8, seed=i % 4).sequences[0].text,
                                  range(32)))
        self.assertEqual(texts, wanted * 8)


class AsyncClientTest(CallTests, server_fixture.ServerTestCase):

    make_client = Blocking

    def test_cancelling_the_task_frees_the_request(self):
        async def go():
            async with minitron_client.AsyncClient(self.server.address) as client:
                begun = asyncio.Event()

                async def read():
                    async for _ in client.stream(PROMPT, max_tokens=1000, n=4, ignore_eos=True):
                        begun.set()
                task = asyncio.create_task(read())
                await begun.wait()
                task.cancel()
                with self.assertRaises(asyncio.CancelledError):
                    await task
        self.client.run(go())
        self.wait_until_idle()

    def test_many_calls_at_once(self):
        async def go():
            async with minitron_client.AsyncClient(self.server.address) as client:
                return await asyncio.gather(*(client.generate(PROMPT, max_tokens=8, seed=i % 4) for i in range(32)))

        wanted = [self.client.generate(PROMPT, max_tokens=8, seed=seed).sequences[0].text for seed in range(4)]
        self.assertEqual([answer.sequences[0].text for answer in self.client.run(go())], wanted * 8)


class DocumentationTest(server_fixture.ServerTestCase):
    """The README's code and the examples do what they say. The README's part with TLS runs in the refusal test."""

    PACKAGE = server_fixture.ROOT / "clients" / "python"

    def run_python(self, *arguments, text=""):
        done = subprocess.run([sys.executable, "-B", *arguments], input=text, capture_output=True, text=True,
                              check=False)
        self.assertEqual((done.returncode, done.stderr), (0, ""), arguments[-1])
        return done.stdout

    def example(self, name, *arguments, text=""):
        return self.run_python(str(self.PACKAGE / "examples" / name), self.server.address, *arguments, text=text)

    def test_the_code_of_the_readme(self):
        blocks = [block for block in readme_blocks() if "inference.example" not in block]
        self.assertEqual(len(blocks), 4)
        calls, for_asyncio, operators, refusal = (
            self.run_python("-c", block.replace("localhost:50051", self.server.address)) for block in blocks)
        native = self.native.generate("To be or not to be,", 32, temperature=0, stop=["\n"]).sequences[0].text
        self.assertTrue(calls.startswith(native + "\n"), calls)
        self.assertTrue(calls.endswith("Grüße minitron-tiny\n"), calls)
        self.assertIn("['", for_asyncio)
        self.assertIn("HealthStatus.SERVING", operators)
        self.assertIn("0 requests were live", operators)
        self.assertEqual(refusal, "sampling.temperature 3.5 2\n")

    def test_the_examples(self):
        native = self.native.generate("Once upon a time", 60, temperature=0.8, seed=7, stop=["\n\n"]).sequences[0]
        usage = native.finished.usage
        counts = f"\n[{usage.prompt_tokens} + {usage.completion_tokens} tokens, FINISH_REASON_"
        self.assertTrue(self.example("stream.py").startswith("Once upon a time" + native.text + counts))
        prompts = ["One,", "Two,", "Grüße"]
        wanted = [prompt + self.native.generate(prompt, 16, temperature=0, stop=["\n"]).sequences[0].text
                  for prompt in prompts]
        self.assertEqual(self.example("many.py", text="\n".join(prompts)).splitlines(), wanted)
        ranked = self.example("choose.py", "To be or not", " king's", " to be").splitlines()
        self.assertEqual([line[10:] for line in ranked], [" to be", " king's"])
        self.assertRegex(self.example("operate.py", "status"), r"minitron-tiny on cpu, .* SERVING\nrunning 0 of \d+, ")
        self.assertEqual(self.example("operate.py", "cancel", "a", "b"), "0 of 2 were live\n")
        self.assertEqual({path.name for path in (self.PACKAGE / "examples").glob("*.py")},
                         {"stream.py", "many.py", "choose.py", "operate.py"})

    @classmethod
    def tearDownClass(cls):
        if subprocess.check_output([sys.executable, "-B", cls.PACKAGE / "examples" / "operate.py", cls.server.address,
                                    "drain"]) != b"draining\n":
            raise AssertionError("operate.py drain")
        super().tearDownClass()


def readme_blocks():
    text = (DocumentationTest.PACKAGE / "README.md").read_text()
    return re.findall(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


if __name__ == "__main__":
    server_fixture.require_current_client()
    unittest.main()
