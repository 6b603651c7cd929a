"""NVIDIA's perf_analyzer and genai-perf, unmodified, over Open Inference and HTTP: make test-perf-analyzer."""

import csv
import glob
import json
import os
import pathlib
import re
import shutil
import subprocess
import tempfile
import unittest

import server_fixture

VENV = server_fixture.ROOT / "build" / "venv-perf"
MODEL = "minitron-tiny"
PROMPTS = ["To be or not to be,", "Once upon a time", "Grüße, 你好 🙂"]


class PerfAnalyzerTest(server_fixture.ServerTestCase):

    flags = ("--http-port", "0", "--chat-template", "nemotron-mini")

    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = pathlib.Path(folder.name)

    def run_program(self, name, *arguments):
        (cudart,) = glob.glob(str(VENV / "lib/python*/site-packages/nvidia/cuda_runtime/lib"))
        environment = {**os.environ, "PATH": f"{VENV / 'bin'}:{os.environ['PATH']}", "LD_LIBRARY_PATH": cudart,
                       "HF_HUB_OFFLINE": "1", "HF_HOME": str(self.folder)}
        done = subprocess.run([VENV / "bin" / name, *arguments], cwd=self.folder, env=environment, capture_output=True,
                              text=True, check=False)
        self.assertEqual(done.returncode, 0, done.stdout[-4000:] + done.stderr[-4000:])
        return done.stdout

    def analyze(self, stream, *arguments):
        """The printed report and the requests of the profile."""
        data = [{"text_input": [prompt], "stream": [stream], "exclude_input_in_output": [True],
                 "sampling_parameters": [json.dumps({"max_tokens": str(8 + 4 * i), "seed": i, "ignore_eos": True})]}
                for i, prompt in enumerate(PROMPTS)]
        (self.folder / "inputs.json").write_text(json.dumps({"data": data}))
        report = self.run_program(
            "perf_analyzer", "-m", MODEL, "-u", self.server.address, "-i", "grpc", "--async", "--streaming",
            "--input-data", "inputs.json", "--profile-export-file", "profile.json", "--verbose", *arguments)
        (experiment,) = json.loads((self.folder / "profile.json").read_text())["experiments"]
        return report, experiment["requests"]

    def check(self, report, requests, count):
        """All were answered, the server counted as many, and each text is the native one."""
        self.assertEqual(len(requests), count)
        (client, *_), (server,) = (re.findall(pattern, report) for pattern in (
            r"Request count: (\d+)", r"Successful request count: (\d+)"))
        self.assertEqual((int(client), int(server)), (count, count))
        seen = set()
        for request in requests:
            prompt = request["request_inputs"]["text_input"]
            i = PROMPTS.index(prompt)
            seen.add(i)
            text = "".join(answer.get("text_output", "") for answer in request["response_outputs"])
            self.assertEqual(text, self.wanted(i))
        self.assertEqual(len(seen), len(PROMPTS))

    def wanted(self, i):
        request = self.native.message("minitron.v1.GenerateRequest")()
        request.task.text, request.task.sampling.seed = PROMPTS[i], i
        request.task.stopping.max_tokens, request.task.stopping.ignore_eos = 8 + 4 * i, True
        return self.native.call("minitron.v1.GenerationService", "Generate", request).sequences[0].text

    def test_streams_in_a_closed_loop(self):
        report, requests = self.analyze(True, "--concurrency-range", "4", "--request-count", "60")
        self.check(report, requests, 60)
        self.assertTrue(all(len(request["response_timestamps"]) > 2 for request in requests))

    def test_whole_answers_over_the_stream(self):
        report, requests = self.analyze(False, "--concurrency-range", "4", "--request-count", "60")
        self.check(report, requests, 60)

    def test_streams_at_a_rate(self):
        report, requests = self.analyze(True, "--request-rate-range", "50", "--request-distribution", "poisson",
                                        "--request-count", "60")
        self.check(report, requests, 60)

    def test_genai_perf(self):
        tokenizer = self.folder / "tokenizer"
        tokenizer.mkdir()
        shutil.copy(server_fixture.ROOT / "deploy/models/minitron-tiny/tokenizer.model", tokenizer)
        (tokenizer / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer", "use_fast": false}')
        http = "127.0.0.1:" + self.server.ports["http"]
        for name, address, protocol in (("vllm", self.server.address, ("kserve", "--backend", "vllm")),
                                        ("tensorrtllm", self.server.address, ("kserve", "--backend", "tensorrtllm")),
                                        ("completions", http, ("completions",)), ("chat", http, ("chat",))):
            artifacts = self.folder / name
            self.run_program(
                "genai-perf", "profile", "-m", MODEL, "--endpoint-type", *protocol, "--streaming", "-u", address,
                "--tokenizer", str(tokenizer), "--synthetic-input-tokens-mean", "30", "--output-tokens-mean", "12",
                *(("--output-tokens-mean-deterministic",) if "kserve" in protocol else ("--extra-inputs", "min_tokens:12")),
                "--num-prompts", "8", "--request-count", "20", "--concurrency", "2", "--artifact-dir", str(artifacts))
            (table,) = artifacts.glob("*/*genai_perf.csv")
            rows = {row[0]: row[1:] for row in csv.reader(table.read_text().splitlines()) if row}
            self.assertEqual(float(rows["Request Count (count)"][0]), 20, rows)
            # It makes tokens of each text anew, where the first word may be one more.
            self.assertAlmostEqual(float(rows["Output Sequence Length (tokens)"][0]), 12, delta=1)
            self.assertGreater(float(rows["Time To First Token (ms)"][0]), 0)


if __name__ == "__main__":
    unittest.main()
