#!/usr/bin/env python3
"""run.py without a GPU: every stage that can run over the emulation or the CPU backend does, at the smallest sizes;
stages resume, fail by themselves and are left when time is over; the table is made of what was measured and nothing
else."""
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import unittest

HERE = pathlib.Path(__file__).resolve().parent
BINARIES = pathlib.Path(os.environ["MINITRON_BINARIES"])
sys.path.insert(0, str(HERE))
import report  # noqa: E402

STAGES_HERE = ["device", "kernels", "ceilings", "model", "roofline", "steps", "serve", "load"]


def script(path, text):
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


class RunTest(unittest.TestCase):
    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.bundle, self.out = pathlib.Path(folder.name) / "bundle", pathlib.Path(folder.name) / "out"
        (self.bundle / "bin").mkdir(parents=True)
        for name in ("minitron-server", "minitron", "minitron-gpu-load"):
            (self.bundle / "bin" / name).symlink_to(BINARIES / name)
        script(self.bundle / "bin" / "minitron-gpu-bench",
               f'case $1 in ceilings|roofline) exec "{BINARIES}/minitron-gpu-bench-emulated" "$@" ;; '
               f'*) exec "{BINARIES}/minitron-gpu-bench-cpu" "$@" ;; esac')
        script(self.bundle / "bin" / "cuda_tests_gpu", "exit 0")
        models = self.bundle / "deploy" / "models"
        models.mkdir(parents=True)
        (models / "minitron-tiny").symlink_to(HERE.parents[1] / "deploy" / "models" / "minitron-tiny")
        script(self.bundle / "bin" / "nvidia-smi", "echo 'Test Device, 1.2, 1000, 1500, 2000'")

    def run_stages(self, *arguments, environment=None):
        return subprocess.run(
            [sys.executable, HERE / "run.py", "--bundle", self.bundle, "--out", self.out, "--shape", "tiny",
             "--backend", "cpu", *arguments], capture_output=True, text=True, timeout=240,
            env={**os.environ, "PATH": f"{self.bundle / 'bin'}:{os.environ['PATH']}", **(environment or {})})

    def records(self, stage):
        return json.loads((self.out / f"{stage}.json").read_text())["records"]

    def test_every_stage_that_needs_no_device_runs_and_is_reported(self):
        result = self.run_stages(*STAGES_HERE)
        logs = "".join(path.read_text() for path in sorted(self.out.glob("*.log")))
        self.assertEqual(result.returncode, 0, result.stdout + result.stderr + logs[-4000:])
        for stage in STAGES_HERE:
            self.assertIn(f"gpu: {stage} passed in", result.stdout)
        self.assertEqual({r["name"] for r in self.records("ceilings")}, {"copy", "read", "bf16 GEMM"})
        kernels = {r["name"] for r in self.records("roofline")}
        self.assertEqual(kernels, {"norm", "squared relu",
                                   *[f"{m} bf16{c}" for m in ("qkv", "o", "fc1", "fc2", "head")
                                     for c in ("", ", free choice")],
                                   *[f"{m} {f}" for m in ("o", "fc1", "fc2") for f in ("int8", "int4", "fp8")],
                                   *[f"{a} attention {f}" for a in ("decode", "prefill") for f in ("bf16", "fp8")]})
        for record in self.records("roofline"):
            self.assertGreater(record["us"], 0)
            self.assertGreater(record["bytes"], 0)
        steps = [r for r in self.records("steps") if r["kind"] == "step"]
        self.assertEqual({(r["weights"], r["launch"], r["batch"]) for r in steps},
                         {(*w, b) for w in (("bf16", "plain"), ("bf16", "early"), ("int8", "plain"), ("int4", "plain"))
                          for b in (1, 4)})
        for record in self.records("load"):
            self.assertEqual(record.get("failed", 0), 0)
        self.assertGreater([r for r in self.records("load") if r["kind"] == "load"][0]["tokens_per_s"], 0)
        self.assertIn("| ceiling: read |", result.stdout)
        self.assertEqual(len(list(self.out.glob("test-device-*.md"))), 1)

        again = self.run_stages(*STAGES_HERE)
        self.assertEqual(again.returncode, 0)
        for stage in STAGES_HERE:
            self.assertIn(f"gpu: {stage} passed before", again.stdout)

    def test_a_stage_that_fails_is_told_leaves_the_others_and_is_repeated(self):
        script(self.bundle / "bin" / "cuda_tests_gpu", 'case "$*" in *=-CudaRunner*) exit 0 ;; esac; exit 3')
        result = self.run_stages("kernels", "model", "device")
        self.assertEqual(result.returncode, 1)
        self.assertRegex(result.stdout,
                         r"gpu: model FAILED in \d+ s: cuda_tests_gpu ended with status 3; see .*model.log")
        self.assertIn("gpu: device passed in", result.stdout)
        script(self.bundle / "bin" / "cuda_tests_gpu", "exit 0")
        again = self.run_stages("kernels", "model")
        self.assertEqual(again.returncode, 0)
        self.assertIn("gpu: kernels passed before", again.stdout)
        self.assertIn("gpu: model passed in", again.stdout)
        self.assertIn("gpu: kernels passed in", self.run_stages("--redo", "kernels", "kernels").stdout)

    def test_what_no_longer_fits_is_left_for_the_next_run(self):
        result = self.run_stages("--budget", "10", "device", "load")
        self.assertEqual(result.returncode, 0)
        self.assertIn("gpu: device passed", result.stdout)
        self.assertIn("gpu: load left for the next run", result.stdout)
        self.assertFalse((self.out / "load.json").exists())

    def test_what_a_machine_lacks_is_skipped_with_its_reason_and_tried_again(self):
        for name in ("torch", "transformers", "flashinfer"):  # not here, whatever the machine has
            (self.bundle / f"{name}.py").write_text(f"raise ImportError('no module {name}')")
        environment = {"PYTHONPATH": str(self.bundle), "MINITRON_LLAMA_BENCH": "", "MINITRON_LLAMA_GGUF": ""}
        result = self.run_stages("peers", environment=environment)
        self.assertEqual(result.returncode, 0, result.stdout + result.stderr)
        self.assertRegex(result.stdout, r"gpu: peers skipped: no torch here: no module torch; .*no llama-bench here")
        skipped = {record["name"]: record["why"] for record in self.records("peers")}
        self.assertEqual(set(skipped), {"torch, recorded steps", "transformers, continuous batching", "llama.cpp",
                                        "flashinfer, paged decode", "torch, sdpa"})
        self.assertIn("| peer: llama.cpp, batch 1, context 512 | skipped | slower than ours | no llama-bench here;",
                      result.stdout)
        script(self.bundle / "bin" / "llama-bench",
               "echo '[{\"n_gen\": 0, \"avg_ts\": 900.5}, {\"n_gen\": 128, \"avg_ts\": 12.5}]'")
        environment["MINITRON_LLAMA_GGUF"] = "model.gguf"
        again = self.run_stages("peers", environment=environment)
        self.assertIn("gpu: peers passed in", again.stdout)
        self.assertIn("| peer: llama.cpp, batch 1, context 512 | 12.5 tok/s | slower than ours |  |", again.stdout)
        self.assertIn("gpu: peers passed before", self.run_stages("peers", environment=environment).stdout)

    def test_a_peer_that_breaks_is_told_and_leaves_the_others(self):
        (self.bundle / "torch.py").write_text("raise RuntimeError('a broken installation')")
        script(self.bundle / "bin" / "llama-bench", "echo out of memory >&2; exit 1")
        result = self.run_stages("peers", environment={"PYTHONPATH": str(self.bundle), "MINITRON_LLAMA_GGUF": "m"})
        skipped = {record["name"]: record["why"] for record in self.records("peers")}
        self.assertEqual(result.returncode, 0)
        self.assertEqual(skipped["torch, sdpa"], "RuntimeError: a broken installation")
        self.assertEqual(skipped["llama.cpp"], "llama-bench ended with status 1: out of memory\n")

    def test_unknown_stages_are_refused_by_name(self):
        result = self.run_stages("kernel")
        self.assertEqual(result.returncode, 2)
        self.assertIn("no stage kernel; there are device, kernels,", result.stderr)

    def test_a_missing_program_is_one_line(self):
        (self.bundle / "bin" / "minitron-gpu-bench").unlink()
        result = self.run_stages("ceilings")
        self.assertEqual(result.returncode, 1)
        self.assertIn("No such file or directory; see", result.stdout)


class ReportTest(unittest.TestCase):
    def table(self, **stages):
        with tempfile.TemporaryDirectory() as folder:
            for name, records in stages.items():
                path = pathlib.Path(folder) / f"{name}.json"
                path.write_text(json.dumps({"stage": name, "seconds": 1, "records": records}))
            return report.write(folder).splitlines()

    def test_the_table_has_twenty_rows_and_says_what_was_not_measured(self):
        table = self.table()
        self.assertEqual(len(table), 22)
        for row in table[2:]:
            self.assertEqual(row.count("|"), 5)
            self.assertIn("not measured", row)

    def test_results_are_set_against_ceilings_targets_and_peers(self):
        step = {"kind": "step", "weights": "bf16", "kv": "bf16", "launch": "plain", "batch": 64, "context": 512}
        table = "\n".join(self.table(
            ceilings=[{"kind": "ceiling", "name": "read", "gb_per_s": 4000.0}],
            roofline=[{"kind": "kernel", "name": "fc1 bf16", "rows": 64, "us": 40.0, "bytes": 136e6, "flop": 1},
                      {"kind": "kernel", "name": "fc1 bf16, free choice", "rows": 64, "us": 32.0, "bytes": 136e6}],
            steps=[{**step, "ms": 5.0}, {**step, "launch": "early", "ms": 4.9},
                   {**step, "weights": "fp8", "kv": "fp8", "ms": 3.0},
                   {**step, "weights": "fp8-dynamic", "kv": "fp8", "ms": 2.5}],
            peers=[{"kind": "peer", "name": "torch, recorded steps", "batch": 64, "context": 512,
                    "tokens_per_s": 6400.0}]))
        self.assertIn("| fc1 bf16, rows 64 | 40.0 us |  | 85% of the read ceiling; "
                      "batch invariance costs +25% |", table)
        # (14.45e9 + 64 * 512 * 131072) / 4e12 = 4.686 ms
        self.assertIn("| decode, batch 64, context 512, weights bf16, KV bf16 | 12,800 tok/s | >= 11,700 | "
                      "94% of the read floor; started early +2.0% |", table)
        self.assertIn("| decode, batch 64, context 512, weights fp8, KV fp8 | 21,333 tok/s | about twice bf16 | "
                      "fp8-dynamic 25,600 tok/s |", table)
        self.assertIn("| peer: torch, recorded steps, batch 64, context 512 | 6,400 tok/s | slower than ours | "
                      "ours is 2.00 times as fast |", table)


if __name__ == "__main__":
    unittest.main()
