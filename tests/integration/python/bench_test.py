"""minitron-bench against the real server, in every protocol; loopback only, some dozen requests."""

import json
import os
import pathlib
import signal
import subprocess
import tempfile
import unittest

import server_fixture

BENCH = os.environ["MINITRON_TEST_BENCH"]
MODEL = "minitron-tiny"


class BenchTest(server_fixture.ServerTestCase):

    flags = ("--http-port", "0")

    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = pathlib.Path(folder.name)

    def bench(self, *arguments, code=0, server=None):
        done = subprocess.run([BENCH, "--server", server or self.server.address, "--json", "--quiet", *arguments],
                              capture_output=True, text=True, check=False)
        self.assertEqual(done.returncode, code, done.stderr)
        return [json.loads(line) for line in done.stdout.splitlines()]

    def check(self, run, completed, output_tokens):
        self.assertEqual((run["completed"], run["failed"]), (completed, 0), run["errors_by_code"])
        self.assertEqual(run["total_output_tokens"], output_tokens)
        self.assertGreater(run["duration"], 0)
        self.assertAlmostEqual(run["request_throughput"], completed / run["duration"])
        self.assertAlmostEqual(run["output_throughput"], output_tokens / run["duration"])
        self.assertLessEqual(run["median_ttft_ms"], run["p99_ttft_ms"])
        self.assertLessEqual(run["mean_ttft_ms"], run["mean_e2el_ms"])

    def test_every_protocol_counts_the_same_tokens(self):
        http = "127.0.0.1:" + self.server.ports["http"]
        common = ("--num-prompts", "6", "--concurrency", "2", "--input-len", "20", "--output-len", "5")
        native, = self.bench(*common)
        self.check(native, 6, 30)
        self.assertEqual(native["total_input_tokens"], 120)
        self.assertEqual(native["model_id"], MODEL)
        self.check(self.bench("--protocol", "oip", "--model", MODEL, *common)[0], 6, 30)
        vllm, = self.bench("--protocol", "vllm", *common)
        self.check(vllm, 6, 30)
        self.assertEqual((vllm["total_input_tokens"], vllm["model_id"]), (120, MODEL))
        self.check(self.bench("--protocol", "openai", "--model", MODEL, *common, server=http)[0], 6, 30)
        ids, = self.bench("--protocol", "openai", "--model", MODEL, "--vocab-size", "2048", *common, server=http)
        self.check(ids, 6, 30)
        self.assertEqual(ids["total_input_tokens"], 120)

    def test_errors_are_counted_by_code(self):
        run, = self.bench("--num-prompts", "3", "--concurrency", "1", "--input-len", "100000", code=3)
        self.assertEqual(run["errors_by_code"], {"INVALID_ARGUMENT": 3})
        run, = self.bench("--num-prompts", "3", "--concurrency", "1", "--input-len", "100000", "--protocol", "vllm", code=3)
        self.assertEqual(run["errors_by_code"], {"INVALID_ARGUMENT": 3})
        http = "127.0.0.1:" + self.server.ports["http"]
        run, = self.bench("--num-prompts", "2", "--concurrency", "1", "--protocol", "openai", "--model", "other", code=3,
                          server=http)
        self.assertEqual(run["errors_by_code"], {"HTTP_404": 2})

    def test_a_sweep_writes_a_line_per_run_and_a_page(self):
        result, report = self.folder / "runs.jsonl", self.folder / "report.html"
        runs = self.bench("--num-prompts", "8", "--concurrency", "1,2,4", "--output-len", "4", "--detailed", "--warmup", "2",
                          "--goodput", "e2el:60000", "--result", str(result), "--report", str(report))
        self.assertEqual([run["max_concurrency"] for run in runs], [1, 2, 4])
        self.assertEqual([json.loads(line) for line in result.read_text().splitlines()], runs)
        for run in runs:
            self.check(run, 8, 32)
            self.assertLessEqual(run["max_concurrent_requests"], run["max_concurrency"])
            self.assertAlmostEqual(run["request_goodput"], run["request_throughput"])
            self.assertEqual(sum(run["output_lens"]), 32)
        page = report.read_text()
        self.assertEqual(page.count("<figure>"), 4 + 4 + 3)

    def test_a_rate_and_a_trace_are_kept(self):
        run, = self.bench("--num-prompts", "10", "--request-rate", "100", "--burstiness", "0.5", "--output-len", "2")
        self.check(run, 10, 20)
        trace = self.folder / "trace.jsonl"
        trace.write_text("".join(json.dumps({"timestamp": 20 * i, "input_length": 600, "output_length": 3,
                                             "hash_ids": [1, 100 + i]}) + "\n" for i in range(5)))
        run, = self.bench("--dataset", "mooncake", "--dataset-path", str(trace), "--replay", "--detailed")
        self.check(run, 5, 15)
        for i, start in enumerate(sorted(run["start_times"])):
            self.assertGreaterEqual(start, 0.02 * i)

    def test_texts_of_a_file_are_sent_as_they_are(self):
        data = self.folder / "prompts.jsonl"
        text = "To be or not to be,"
        data.write_text(json.dumps({"prompt": text, "output_tokens": 7}) + "\n")
        run, = self.bench("--dataset", "jsonl", "--dataset-path", str(data), "--concurrency", "1")
        self.check(run, 1, 7)
        self.assertEqual(run["total_input_tokens"], self.native.generate(text, 1).started.prompt_token_count)

    def test_a_bad_data_set_sends_nothing(self):
        data = self.folder / "prompts.jsonl"
        data.write_text("{}\n")
        done = subprocess.run([BENCH, "--server", self.server.address, "--dataset", "jsonl", "--dataset-path", str(data),
                               "--concurrency", "1"], capture_output=True, text=True, check=False)
        self.assertEqual((done.returncode, done.stdout), (2, ""))
        self.assertEqual(done.stderr, f"minitron-bench: {data}:1: prompt: missing\n")

    def test_an_interrupt_ends_the_run_with_its_figures(self):
        process = subprocess.Popen([BENCH, "--server", self.server.address, "--num-prompts", "100000", "--concurrency", "2",
                                    "--json"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        process.stderr.read(1)  # the first line of progress: requests are on their way
        process.send_signal(signal.SIGINT)
        out, _ = process.communicate()
        self.assertEqual(process.returncode, 130)
        run = json.loads(out)
        self.assertIn("interrupted", run["warnings"][0])
        self.assertEqual(run["failed"], 0)


if __name__ == "__main__":
    unittest.main()
