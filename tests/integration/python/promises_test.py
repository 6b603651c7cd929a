"""The promises of the scheduler with the shipped model, through gRPC: one answer, bit for bit, however it is computed."""

import concurrent.futures
import struct
import unittest
import urllib.request

import grpc

import server_fixture

PROMPTS = ["To be or not to be,", "It was the best of times, it was the worst of times", "Call me Ishmael.", "東京 is",
           "Once upon a time there was a miller who had three sons, a mill, a donkey and a cat. " * 3, "A"]


def start(*flags):
    server = server_fixture.Server(*flags)
    return server, server_fixture.NativeApi(server.address)


def request_of(native, index):
    """Of several kinds: greedy, sampled, penalties, n = 2, prompt log-probabilities."""
    request = native.message("minitron.v1.GenerateRequest")()
    task = request.task
    task.text = PROMPTS[index % len(PROMPTS)]
    task.stopping.max_tokens = 20 + 7 * (index % 5)
    task.stopping.ignore_eos = True
    task.sampling.seed = 100 + index
    task.sampling.temperature = (index % 3) * 0.5
    task.output.logprobs = 3
    if index % 4 == 1:
        task.sampling.repetition_penalty = 1.3
    if index % 4 == 2:
        task.sampling.num_sequences = 2
    if index % 4 == 3:
        task.output.prompt_logprobs = 2
    return request


def bits(positions):
    return [(p.chosen.token_id, struct.pack("f", p.chosen.logprob), [(t.token_id, struct.pack("f", t.logprob)) for t in p.top])
            for p in positions]


def answer(native, index):
    response = native.call("minitron.v1.GenerationService", "Generate", request_of(native, index))
    return [bits(response.started.prompt_logprobs),
            [(s.text, list(s.token_ids), bits(s.logprobs), s.finished.reason) for s in response.sequences]]


def metric(server, name):
    text = urllib.request.urlopen(f"http://127.0.0.1:{server.ports['metrics']}/metrics").read().decode()
    return sum(float(line.rsplit(" ", 1)[1]) for line in text.splitlines() if line.startswith(name + "{"))


class PromisesTest(unittest.TestCase):

    COUNT = 24

    @classmethod
    def setUpClass(cls):
        server, native = start("--prefix-cache", "off", "--overlap", "off", "--max-num-sequences", "2")
        cls.alone = [answer(native, index) for index in range(cls.COUNT)]
        native.close()
        server.stop()

    def compare(self, *flags, rounds=1):
        """The same requests, all at once, on a new server. Returns some of its counters."""
        server, native = start(*flags)
        with concurrent.futures.ThreadPoolExecutor(self.COUNT) as pool:
            for _ in range(rounds):
                answers = list(pool.map(lambda index: answer(native, index), range(self.COUNT)))
                self.assertEqual(answers, self.alone, flags)
        figures = {name: metric(server, name)
                   for name in ("minitron_preemptions_total", "minitron_prefix_cache_hits_tokens_total")}
        native.close()
        self.assertEqual(server.stop(), 0)
        return figures

    def test_a_crowd_and_a_restart_change_nothing(self):
        self.compare()

    def test_a_warm_prefix_cache_changes_nothing(self):
        figures = self.compare("--prefix-cache", "shared", rounds=2)
        self.assertGreater(figures["minitron_prefix_cache_hits_tokens_total"], 0)

    def test_steps_planned_ahead_change_nothing(self):
        self.compare("--overlap", "on")

    def test_chunks_of_any_size_change_nothing(self):
        self.compare("--max-prefill-chunk", "16", "--max-step-tokens", "64")
        self.compare("--max-prefill-chunk", "33", "--max-step-tokens", "97")

    def test_preemption_changes_nothing(self):
        # 12 blocks of 32 tokens: a few requests fit, and all of them want to run.
        figures = self.compare("--kv-cache-mib", "1", "--block-size", "32", "--prefix-cache", "off", "--max-context-tokens", "384")
        self.assertGreater(figures["minitron_preemptions_total"], 0)

    def test_a_reserved_completion_is_never_preempted(self):
        figures = self.compare("--kv-cache-mib", "1", "--block-size", "32", "--prefix-cache", "off", "--admission-mode", "reserve",
                               "--max-context-tokens", "384")
        self.assertEqual(figures["minitron_preemptions_total"], 0)

    def test_threads_and_targets_change_nothing(self):
        self.compare("--threads", "2", "--itl-target", "5")

    def test_a_deadline_ends_a_request_and_only_that(self):
        server, native = start("--max-num-sequences", "1")
        long = request_of(native, 0)
        long.task.stopping.max_tokens = 900
        method = native._channel.unary_unary("/minitron.v1.GenerationService/Generate",
                                             type(long).SerializeToString, native.message("minitron.v1.GenerateResponse").FromString)
        running = method.future(long)
        late = request_of(native, 1)
        late.task.first_token_timeout.nanos = 1
        with self.assertRaises(grpc.RpcError) as caught:
            method(late)
        self.assertIn(caught.exception.code(), (grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.UNAVAILABLE))
        self.assertEqual(len(running.result().sequences[0].token_ids), 900)
        self.assertEqual(answer(native, 2), self.alone[2])
        native.close()
        server.stop()


if __name__ == "__main__":
    unittest.main()
