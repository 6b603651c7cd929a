"""lm-evaluation-harness through minitron_client's model `minitron`: its scores against Score and against transformers."""

import json
import math
import os
import pathlib
import tempfile
import unittest

cache = tempfile.TemporaryDirectory()
os.environ["HF_HOME"] = cache.name
os.environ["HF_DATASETS_OFFLINE"] = os.environ["HF_HUB_OFFLINE"] = "1"

import lm_eval  # noqa: E402
import minitron_client.lm_eval_model  # noqa: E402, F401  (registers the model)
import numpy  # noqa: E402
from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.api.registry import get_model  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402
from minitron_client import Client  # noqa: E402

import server_fixture  # noqa: E402

TASKS = pathlib.Path(__file__).resolve().parent / "lm_eval_tasks"
GOLDENS = server_fixture.ROOT / "tests" / "engine" / "goldens"
# Of a sum over a text's tokens. The goldens are fp32 sums in another order, with rows, keys and values in fp32, as here.
TOLERANCE_OF_GOLDENS = 1e-4


def instances(kind, arguments):
    return [Instance(kind, {}, argument, i) for i, argument in enumerate(arguments)]


class MinitronLmEvalTest(server_fixture.ServerTestCase):

    flags = ("--kv-cache-dtype", "fp32", "--activation-dtype", "fp32")

    def setUp(self):
        os.chdir(TASKS)  # the tasks name their data by relative paths
        self.documents = [json.loads(line) for line in (TASKS / "tiny_choice.jsonl").read_text().splitlines()]
        self.client = Client(self.server.address)
        self.addCleanup(self.client.close)

    def model(self, **options):
        options = {"target": self.server.address, **options}
        return get_model("minitron").create_from_arg_string(",".join(f"{k}={v}" for k, v in options.items()))

    def test_loglikelihoods_are_those_of_score(self):
        pairs = [(doc["question"], choice) for doc in self.documents for choice in doc["choices"]]
        for concurrent in (1, 8):
            answers = self.model(num_concurrent=concurrent).loglikelihood(instances("loglikelihood", pairs))
            for (context, target), (logprob, is_greedy) in zip(pairs, answers, strict=True):
                wanted = self.client.score(context, target)
                self.assertEqual((logprob, is_greedy), (wanted.total_logprob, wanted.is_greedy))

    def test_an_empty_context_is_bos(self):
        (answer,) = self.model().loglikelihood(instances("loglikelihood", [("", "To be or not")]))
        wanted = self.client.score("", "To be or not", add_bos=True)
        self.assertAlmostEqual(answer[0], sum(p.chosen.logprob for p in wanted.positions[-self.count("To be or not"):]),
                               delta=1e-5)

    def count(self, text):
        return len(self.client.tokenize(text).token_ids)

    def test_loglikelihoods_are_those_of_transformers(self):
        """From the committed logits of NemotronForCausalLM, at every position of the first prompt."""
        goldens = json.loads((GOLDENS / "tiny.json").read_text())
        tokens = goldens["prompts"][0]
        vocab = goldens["vocab_size"]
        logits = numpy.fromfile(GOLDENS / "tiny.bin", "<f4", len(tokens) * vocab).reshape(-1, vocab).astype("f8")
        logprobs = logits - numpy.log(numpy.exp(logits).sum(axis=1, keepdims=True))
        text = self.client.detokenize(tokens)
        for split in (1, 4, 12, len(tokens) - 1):
            context = self.client.detokenize(tokens[:split])
            self.assertEqual(list(self.client.tokenize(context).token_ids), tokens[:split])
            ((logprob, is_greedy),) = self.model().loglikelihood(
                instances("loglikelihood", [(context, text[len(context):])]))
            rows = range(split - 1, len(tokens) - 1)
            self.assertAlmostEqual(logprob, sum(logprobs[i, tokens[i + 1]] for i in rows), delta=TOLERANCE_OF_GOLDENS)
            self.assertEqual(is_greedy, all(int(logits[i].argmax()) == tokens[i + 1] for i in rows))

    def test_rolling_loglikelihoods_are_those_of_score_in_windows(self):
        text = "It was the best of times, it was the worst of times, it was the age of wisdom. "
        tokens = list(self.client.tokenize(text, add_bos=False).token_ids)
        bos = self.client.models()[0].bos_token_id
        (whole,) = self.model().loglikelihood_rolling(instances("loglikelihood_rolling", [(text,)]))
        self.assertAlmostEqual(whole, self.client.score([bos], tokens).total_logprob, delta=1e-6)
        size = 8
        (windowed,) = self.model(max_length=size + 1).loglikelihood_rolling(
            instances("loglikelihood_rolling", [(text,)]))
        wanted, begin = self.client.score([bos], tokens[:size]).total_logprob, size
        while begin < len(tokens):  # each window is full: it reaches back for context where the text ends
            end = min(begin + size, len(tokens))
            wanted += self.client.score(tokens[end - size - 1:begin], tokens[begin:end]).total_logprob
            begin = end
        self.assertAlmostEqual(windowed, wanted, delta=1e-6)
        self.assertFalse(math.isclose(windowed, whole, abs_tol=1e-3))

    def test_a_context_that_is_too_long_keeps_its_end(self):
        question, choice = "word " * 50 + "To be or not", " to be"
        (answer,) = self.model(max_length=16).loglikelihood(instances("loglikelihood", [(question, choice)]))
        target = list(self.client.tokenize(question + choice).token_ids)[self.count(question):]
        context = list(self.client.tokenize(question).token_ids)[-(16 - len(target)):]
        self.assertEqual(answer[0], self.client.score(context, target).total_logprob)
        with self.assertRaises(ValueError):
            self.model(max_length=4).loglikelihood(instances("loglikelihood", [("a", "word " * 50)]))

    def test_settings_that_cannot_be_honoured_are_refused(self):
        for settings in ({"num_beams": 4}, {"max_gen_toks": 1 << 20}):
            with self.assertRaises(ValueError):
                self.model().generate_until(instances("generate_until", [("a", settings)]))
        with self.assertRaises(ValueError):
            self.model(max_length=1 << 20)

    def test_tasks_run_through_the_harness(self):
        results = lm_eval.simple_evaluate(
            model="minitron", model_args=f"target={self.server.address}", tasks=["tiny_choice", "tiny_generate"],
            log_samples=True, task_manager=TaskManager(include_path=str(TASKS), include_defaults=False),
            bootstrap_iters=0)
        right = 0
        for doc in self.documents:
            totals = [self.client.score(doc["question"], choice).total_logprob for choice in doc["choices"]]
            right += totals.index(max(totals)) == doc["answer"]
        self.assertEqual(results["results"]["tiny_choice"]["acc,none"], right / len(self.documents))
        for sample in results["samples"]["tiny_generate"]:
            native = self.native.generate(sample["doc"]["question"], 12, temperature=0, stop=["\n"])
            self.assertEqual(sample["resps"][0][0], native.sequences[0].text)


if __name__ == "__main__":
    server_fixture.require_current_client()
    unittest.main()
