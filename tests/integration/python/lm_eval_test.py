"""lm-evaluation-harness, unmodified, through `local-completions` on the HTTP port; its scores against Score."""

import json
import os
import pathlib
import tempfile
import unittest

cache = tempfile.TemporaryDirectory()
os.environ["HF_HOME"] = cache.name
os.environ["HF_DATASETS_OFFLINE"] = os.environ["HF_HUB_OFFLINE"] = "1"

import lm_eval  # noqa: E402
from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.api.registry import get_model  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

import server_fixture  # noqa: E402

MODEL = "minitron-tiny"
TASKS = pathlib.Path(__file__).resolve().parent / "lm_eval_tasks"
# Both sum the same floats, one in double here, one in double there.
TOLERANCE = 1e-4


class LmEvalTest(server_fixture.ServerTestCase):

    flags = ("--http-port", "0")

    def setUp(self):
        os.chdir(TASKS)  # the tasks name their data by relative paths
        self.documents = [json.loads(line) for line in (TASKS / "tiny_choice.jsonl").read_text().splitlines()]

    def model(self, **options):
        arguments = {"model": MODEL, "base_url": f"http://127.0.0.1:{self.server.ports['http']}/v1/completions",
                     "tokenizer_backend": "remote", "max_length": 1024, "max_retries": 1, **options}
        return get_model("local-completions").create_from_arg_string(
            ",".join(f"{key}={value}" for key, value in arguments.items()))

    def score(self, context, target):
        request = self.native.message("minitron.v1.ScoreRequest")()
        request.context_text, request.target_text = context, target
        return self.native.call("minitron.v1.GenerationService", "Score", request)

    def test_loglikelihoods_are_those_of_score(self):
        pairs = [(doc["question"], choice) for doc in self.documents for choice in doc["choices"]]
        for batch_size, concurrent in ((1, 1), (5, 1), (2, 4)):
            model = self.model(batch_size=batch_size, num_concurrent=concurrent)
            answers = model.loglikelihood([Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)])
            for (context, target), (logprob, is_greedy) in zip(pairs, answers):
                wanted = self.score(context, target)
                self.assertAlmostEqual(logprob, wanted.total_logprob, delta=TOLERANCE, msg=(context, target))
                self.assertEqual(is_greedy, wanted.is_greedy)

    def test_a_multiple_choice_task_has_the_accuracy_that_score_gives(self):
        results = lm_eval.simple_evaluate(
            model=self.model(batch_size=4), tasks=["tiny_choice"],
            task_manager=TaskManager(include_path=str(TASKS), include_defaults=False), bootstrap_iters=0)
        right = 0
        for doc in self.documents:
            totals = [self.score(doc["question"], choice).total_logprob for choice in doc["choices"]]
            right += totals.index(max(totals)) == doc["answer"]
        self.assertEqual(results["results"]["tiny_choice"]["acc,none"], right / len(self.documents))

    def test_generations_are_the_native_ones(self):
        results = lm_eval.simple_evaluate(
            model=self.model(), tasks=["tiny_generate"], log_samples=True,
            task_manager=TaskManager(include_path=str(TASKS), include_defaults=False), bootstrap_iters=0)
        for sample in results["samples"]["tiny_generate"]:
            native = self.native.generate(sample["doc"]["question"], 12, temperature=0, stop=["\n"])
            self.assertEqual(sample["resps"][0][0], native.sequences[0].text)


if __name__ == "__main__":
    unittest.main()
