#!/usr/bin/env python3
"""run.py without a GPU: every stage that can run over the emulation or the CPU backend does, at the smallest sizes;
stages resume, fail by themselves, keep what they measured and are left when time is over; what is not here is told."""
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
import stages  # noqa: E402

STAGES_HERE = ["device", "kernels", "serve", "ceilings", "model", "steps", "load", "roofline", "steps-early", "closed",
               "poisson", "steps-int8", "steps-int4"]
HOW = "alone,together,steps"
SMI = "echo 'Test Device, 1.2, [N/A], 1980, 3201, 345, 30, 700'"
TESTS = "echo '[  PASSED  ] 3 tests.'"


def script(path, text):
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


class StagesTest(unittest.TestCase):
    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = pathlib.Path(folder.name)
        self.bundle, self.out, self.work = [self.folder / name for name in ("bundle", "out", "work")]
        self.bin = self.bundle / "bin"
        self.bin.mkdir(parents=True)
        for name in ("minitron-server", "minitron", "minitron-gpu-load"):
            (self.bin / name).symlink_to(BINARIES / name)
        script(self.bin / "minitron-gpu-bench",
               f'case $1 in ceilings|roofline|kernel) exec "{BINARIES}/minitron-gpu-bench-emulated" "$@" ;; '
               f'*) exec "{BINARIES}/minitron-gpu-bench-cpu" "$@" ;; esac')
        script(self.bin / "cuda_tests_gpu", TESTS)
        models = self.bundle / "deploy" / "models"
        models.mkdir(parents=True)
        (models / "minitron-tiny").symlink_to(HERE.parents[1] / "deploy" / "models" / "minitron-tiny")
        script(self.bin / "nvidia-smi", SMI)

    def run_stages(self, *arguments, environment=None, out=None):
        return subprocess.run(
            [sys.executable, HERE / "run.py", "--bundle", self.bundle, "--out", out or self.out, "--work", self.work,
             "--shape", "tiny", "--backend", "cpu", *arguments], capture_output=True, text=True, timeout=240,
            env={**os.environ, "PATH": f"{self.bin}:{os.environ['PATH']}", **(environment or {})})

    def stage(self, name):
        return json.loads((self.out / "results.json").read_text())["stages"][name]

    def records(self, name, kind):
        return [record for record in self.stage(name)["records"] if record["kind"] == kind]

    def make_results(self, **stages_of_before):
        self.out.mkdir(exist_ok=True)
        (self.out / "results.json").write_text(json.dumps({"stages": {
            name: {"state": "passed", "seconds": 1, "error": "", "records": records}
            for name, records in stages_of_before.items()}}))

    def test_every_stage_that_needs_no_device_runs_and_is_reported(self):
        result = self.run_stages(*STAGES_HERE, "layers")
        logs = (self.out / "logs.txt").read_text()
        self.assertEqual(result.returncode, 0, result.stdout + result.stderr + logs[-4000:])
        for stage in STAGES_HERE:
            self.assertIn(f"gpu: {stage} passed in", result.stdout)
            self.assertIn(f"===== {stage} =====", logs)
        self.assertEqual({r["name"] for r in self.records("ceilings", "ceiling")}, {"copy", "read", "bf16 GEMM"})
        self.assertEqual({r["name"] for r in self.records("roofline", "kernel")},
                         {"norm", "squared relu", "rope",
                          *[f"{m} bf16{c}" for m in ("qkv", "o", "fc1", "fc2", "head")
                            for c in ("", ", free choice", ", first choice")],
                          *[f"{m} {f}" for m in ("o", "fc1", "fc2") for f in ("int8", "int4", "fp8")],
                          *[f"{a} attention {f}" for a in ("decode", "prefill") for f in ("bf16", "fp8")]})
        for record in self.records("roofline", "kernel"):
            self.assertGreater(record["us"], 0)
            self.assertGreater(record["bytes"], 0)
        for stage, format_and_launch in (("steps", ("bf16", "plain")), ("steps-early", ("bf16", "early")),
                                         ("steps-int8", ("int8", "plain")), ("steps-int4", ("int4", "plain"))):
            self.assertEqual({(r["weights"], r["launch"], r["batch"]) for r in self.records(stage, "step")},
                             {(*format_and_launch, batch) for batch in (1, 4)})
            self.assertGreater(self.records(stage, "prefill")[0]["tokens_per_s"], 0)
        loads = [r for stage in ("load", "closed", "poisson") for r in self.records(stage, "load")]
        self.assertEqual({r["mode"] for r in loads}, {"steady", "closed", "poisson"})
        for record in loads:
            self.assertEqual((record["failed"], record["weights"]), (0, "bf16"))
            self.assertGreater(record["tokens_per_s"], 0)
        self.assertEqual([r["start"] for r in self.records("load", "ready")], ["first", "second"])
        bits = self.records("layers", "bits")
        self.assertEqual([(r["what"], r["same"], r["largest_nats"]) for r in bits],
                         [("prompts alone and in one batch", True, 0), ("prompts and decode steps", True, 0)])
        self.assertIn("| ceiling: read |", result.stdout)
        page = (self.out / "test-device-unknown.md").read_text()
        for heading in ("Decode steps", "Load over gRPC", "Kernels", "Starts, s", "Stages"):
            self.assertIn(f"\n## {heading}\n", page)
        self.assertNotIn("gpu: no table", result.stdout)
        files = list(self.out.iterdir())  # what comes back from a lent machine is few files, none in folders
        self.assertLessEqual(len(files), 8)
        self.assertTrue(all(file.is_file() and file.stat().st_size < 1 << 24 for file in files), files)

    def test_a_second_run_repeats_only_what_it_is_told_to_and_goes_on_elsewhere(self):
        self.run_stages("device", "kernels")
        again = self.run_stages("--redo", "kernels", "device", "kernels")
        self.assertIn("gpu: device passed before", again.stdout)
        self.assertIn("gpu: kernels passed in", again.stdout)
        elsewhere = self.folder / "elsewhere"
        third = self.run_stages("--resume", self.out / "results.json", "device", "kernels", "model", out=elsewhere)
        self.assertIn("gpu: kernels passed before", third.stdout)
        self.assertIn("gpu: model passed in", third.stdout)
        kept = json.loads((elsewhere / "results.json").read_text())["stages"]
        self.assertEqual(set(kept), {"device", "kernels", "model"})

    def test_a_stage_that_fails_is_told_leaves_the_others_and_is_repeated(self):
        script(self.bin / "cuda_tests_gpu", f'case "$*" in *=-CudaRunner*) {TESTS}; exit 0 ;; esac; '
               'echo "[  FAILED  ] CudaRunnerTest.Planted"; exit 3')
        result = self.run_stages("kernels", "model", "device")
        self.assertEqual(result.returncode, 1)
        self.assertRegex(result.stdout, r"gpu: model FAILED in \d+ s: cuda_tests_gpu ended with status 3: "
                                        r"CudaRunnerTest.Planted; see .*logs.txt")
        self.assertIn("gpu: device passed in", result.stdout)
        self.assertIn("runner 0 passed, 1 FAILED", result.stdout)
        script(self.bin / "cuda_tests_gpu", TESTS)
        again = self.run_stages("kernels", "model")
        self.assertEqual(again.returncode, 0)
        self.assertIn("gpu: kernels passed before", again.stdout)
        self.assertIn("gpu: model passed in", again.stdout)

    def test_a_run_of_no_tests_is_a_failure(self):
        script(self.bin / "cuda_tests_gpu", "echo '[  PASSED  ] 0 tests.'")
        result = self.run_stages("kernels")
        self.assertRegex(result.stdout, r"gpu: kernels FAILED in \d+ s: no test was run")

    def test_what_a_stage_measured_before_it_failed_is_kept(self):
        step = {"kind": "step", "weights": "bf16", "kv": "bf16", "launch": "plain", "batch": 1, "context": 512, "ms": 4}
        script(self.bin / "minitron-gpu-bench", f"echo '{json.dumps(step)}'; echo '{{\"cut off'; exit 1")
        result = self.run_stages("steps")
        self.assertEqual(result.returncode, 1)
        self.assertEqual((self.stage("steps")["state"], self.stage("steps")["records"]), ("failed", [step]))
        self.assertIn("| decode, batch 1, context 512, bf16 | 250 tok/s | >= 250 |", result.stdout)
        script(self.bin / "minitron-gpu-bench", "exit 1")  # measures nothing: what was there stays
        self.run_stages("steps")
        self.assertEqual(self.stage("steps")["records"], [step])

    def test_what_no_longer_fits_is_left_for_the_next_run(self):
        result = self.run_stages("--budget", "60", "device", "load")
        self.assertEqual(result.returncode, 0)
        self.assertIn("gpu: device passed", result.stdout)
        self.assertIn("gpu: load left for the next run", result.stdout)
        self.assertNotIn("load", json.loads((self.out / "results.json").read_text())["stages"])

    def test_a_program_that_hangs_is_ended_with_its_children_when_the_budget_is_over(self):
        script(self.bin / "nvidia-smi", "tail -f /dev/null & wait")
        result = self.run_stages("--budget", "4", "device")
        self.assertRegex(result.stdout, r"gpu: device FAILED in \d s: nvidia-smi took more than \d s")

    def test_what_a_machine_lacks_is_skipped_with_its_reason_and_tried_again(self):
        for name in ("torch", "transformers", "flashinfer"):  # not here, whatever the machine has
            (self.bundle / f"{name}.py").write_text(f"raise ImportError('no module {name}')")
        environment = {"PYTHONPATH": str(self.bundle), "MINITRON_LLAMA_BENCH": "", "MINITRON_LLAMA_GGUF": ""}
        result = self.run_stages("peers", environment=environment)
        self.assertEqual(result.returncode, 0, result.stdout + result.stderr)
        self.assertRegex(result.stdout, r"gpu: peers skipped: no torch here: no module torch; .*no llama-bench here")
        self.assertEqual({record["name"] for record in self.records("peers", "skipped")},
                         {"torch, recorded steps", "torch, compiled steps", "transformers, continuous batching",
                          "llama.cpp", "flashinfer, paged decode", "torch, sdpa"})
        self.assertIn("| peer: llama.cpp, batch 1, context 512 | skipped | slower than ours | no llama-bench here;",
                      result.stdout)
        script(self.bin / "llama-bench",
               "echo '[{\"n_gen\": 0, \"avg_ts\": 900.5}, {\"n_gen\": 128, \"avg_ts\": 12.5}]'")
        environment["MINITRON_LLAMA_GGUF"] = "model.gguf"
        again = self.run_stages("peers", environment=environment)
        self.assertIn("gpu: peers passed in", again.stdout)
        self.assertIn("| peer: llama.cpp, batch 1, context 512 | 12.5 tok/s | slower than ours |  |", again.stdout)
        self.assertIn("gpu: peers passed before", self.run_stages("peers", environment=environment).stdout)

    def test_a_peer_that_breaks_is_told_and_leaves_the_others(self):
        (self.bundle / "torch.py").write_text("import os; os._exit(7)")
        script(self.bin / "llama-bench", "echo out of memory >&2; exit 1")
        result = self.run_stages("peers", environment={"PYTHONPATH": str(self.bundle), "MINITRON_LLAMA_GGUF": "m"})
        skipped = {record["name"]: record["why"] for record in self.records("peers", "skipped")}
        self.assertEqual(result.returncode, 0)
        self.assertRegex(skipped["torch, sdpa"], "python.* ended with status 7")
        self.assertEqual(skipped["llama.cpp"], "llama-bench ended with status 1: out of memory\n")

    def test_a_server_that_does_not_start_is_told(self):
        (self.bin / "minitron-server").unlink()
        script(self.bin / "minitron-server", "exit 3")
        result = self.run_stages("serve")
        self.assertRegex(result.stdout, r"gpu: serve FAILED .*the server ended with status 3 before it was ready")

    def test_the_worst_kernels_are_profiled_where_a_profiler_is(self):
        kernel = {"kind": "kernel", "rows": 64, "us": 10.0, "bytes": 2e7, "flop": 1e6}
        self.make_results(
            ceilings=[{"kind": "ceiling", "name": "read", "gb_per_s": 4000.0},
                      {"kind": "ceiling", "name": "bf16 GEMM", "tflops": 700.0}],
            roofline=[{**kernel, "name": "norm"}, {**kernel, "name": "decode attention bf16", "context": 512, "bytes": 1e7},
                      {**kernel, "name": "fc1 int4", "bytes": 1e6}, {**kernel, "name": "fc1 int8", "bytes": 3e7},
                      {**kernel, "name": "squared relu", "bytes": 3e7}, {**kernel, "name": "fc1 bf16", "bytes": 1}])
        script(self.bin / "ncu", 'echo "$*" >> calls\necho "    Duration     us     12.5"\n'
               'echo "    Memory Throughput        %        71.23"')
        result = self.run_stages("ncu")
        self.assertIn("gpu: ncu passed", result.stdout)
        profiles = self.records("ncu", "ncu")
        self.assertEqual([r["kernel"] for r in profiles], ["fc1 int4", "decode attention bf16", "norm"])
        self.assertEqual(profiles[0]["metrics"], {"Duration": "12.5 us", "Memory Throughput": "71.23 %"})
        calls = (self.bundle / "calls").read_text().splitlines()
        self.assertIn("--clock-control none --kernel-name regex:DecodeKernel", calls[1])
        self.assertTrue(calls[1].endswith("minitron-gpu-bench kernel tiny decode attention bf16 64 512"))

    def test_preflight_names_what_is_missing_and_runs_nothing(self):
        result = self.run_stages("--preflight", environment={"LD_LIBRARY_PATH": ""})
        self.assertRegex(result.stdout, r"gpu: ok   minitron-server: starts")
        self.assertRegex(result.stdout, r"gpu: (ok  |MISSING) device: ")
        self.assertRegex(result.stdout, r"gpu: (ok  |MISSING) libcublasLt.so\.?\d*: ")
        self.assertRegex(result.stdout, r"gpu: \d of what is needed (is|are) missing\n$")
        self.assertEqual(result.returncode, 0 if "gpu: 0 of" in result.stdout else 1)
        (self.bin / "cuda_tests_gpu").unlink()
        worse = self.run_stages("--preflight")
        self.assertIn("gpu: MISSING cuda_tests_gpu: does not start", worse.stdout)
        self.assertEqual(worse.returncode, 1)
        self.assertEqual(list(self.out.iterdir()), [])

    def test_unknown_stages_are_refused_by_name(self):
        result = self.run_stages("kernel")
        self.assertEqual(result.returncode, 2)
        self.assertIn("no stage kernel; there are device, kernels,", result.stderr)

    def test_a_missing_program_is_one_line(self):
        (self.bin / "minitron-gpu-bench").unlink()
        result = self.run_stages("ceilings")
        self.assertEqual(result.returncode, 1)
        self.assertIn("No such file or directory; see", result.stdout)


class WeightsTest(unittest.TestCase):
    """Weights made on the device, in emulation, against a file of them and the CPU backend."""

    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = pathlib.Path(folder.name)

    def run_program(self, name, *arguments):
        result = subprocess.run([BINARIES / name, *map(str, arguments)], capture_output=True, text=True, timeout=120)
        self.assertEqual(result.returncode, 0, result.stderr)
        return [json.loads(line) for line in result.stdout.splitlines() if line.startswith("{")]

    def test_they_are_those_of_the_file(self):
        self.run_program("minitron-make-checkpoint", "test", self.folder)
        tokens = self.folder / "tokens"
        tokens.write_text("\n".join(" ".join(str(31 * row + 7 * i) for i in range(length))
                                    for row, length in enumerate((32, 32, 21))))
        made = self.run_program("minitron-gpu-bench-emulated", "score", "random:test", "cuda", tokens, HOW)
        read = self.run_program("minitron-gpu-bench-cpu", "score", self.folder, "cpu", tokens, HOW)
        for scores in (made, read):
            alone, together, steps = [[r["logprobs"] for r in scores if r["how"] == how] for how in HOW.split(",")]
            self.assertEqual([len(line) for line in alone], [31, 31, 20])
            self.assertEqual(alone, together)  # to the bit, on either backend
            self.assertEqual(alone, steps)
        differences = [abs(a - b) for x, y in zip(made, read) for a, b in zip(x["logprobs"], y["logprobs"], strict=True)]
        self.assertLess(sum(differences) / len(differences), 0.03)  # nat; bf16 activations. Other weights: over 1

    def test_the_gap_between_recorded_steps_is_the_work_between_them(self):
        records = self.run_program("minitron-gpu-bench-emulated", "steps", "random:test", "cuda", "none", "bf16",
                                   "plain", "small")
        (gap,) = [record for record in records if record["kind"] == "gap"]
        self.assertEqual((gap["batch"], gap["context"], gap["steps"]), (4, 32, 4))
        # The emulated device takes a microsecond for each piece of work: a step's two copies, one graph.
        self.assertEqual((gap["wait_p99_us"], gap["idle_p50_us"], gap["idle_p99_us"], gap["forward_us"]), (0, 2, 2, 1))
        self.assertGreater(gap["sampling_us"], 3)

    def test_products_without_batch_invariance_are_for_these_weights_alone(self):
        arguments = ("cuda", "none", "bf16", "free", "small")
        records = self.run_program("minitron-gpu-bench-emulated", "steps", "random:test", *arguments)
        self.assertEqual({(r["launch"], r["batch"]) for r in records if r["kind"] == "step"}, {("free", 1), ("free", 4)})
        refused = subprocess.run([BINARIES / "minitron-gpu-bench-cpu", "steps", self.folder, *arguments],
                                 capture_output=True, text=True, timeout=60)
        self.assertEqual(refused.returncode, 1)
        self.assertIn("only a model made on the device can do without invariance", refused.stderr)

    def test_only_the_kernel_asked_for_is_run(self):
        (record,) = self.run_program("minitron-gpu-bench-emulated", "kernel", "tiny", "decode attention fp8", 2, 40)
        self.assertEqual((record["name"], record["rows"], record["context"]), ("decode attention fp8", 2, 40))
        unknown = subprocess.run([BINARIES / "minitron-gpu-bench-emulated", "kernel", "tiny", "none", "2", "40"],
                                 capture_output=True, text=True, timeout=60)
        self.assertEqual(unknown.returncode, 1)
        self.assertIn("no kernel 'none' with 2 rows", unknown.stderr)

    def test_a_checkpoint_that_does_not_fit_is_refused_before_it_is_written(self):
        result = subprocess.run([BINARIES / "minitron-make-checkpoint", "test", self.folder / "missing"],
                                capture_output=True, text=True, timeout=60)
        self.assertEqual(result.returncode, 1)
        self.assertIn("cannot write", result.stderr)

    def test_a_model_is_made_once(self):
        (self.folder / "bin").mkdir()
        script(self.folder / "bin" / "minitron-make-checkpoint", f'echo "$1" >> {self.folder}/made')
        room = self.folder / "work"
        room.mkdir()
        context = stages.Context(self.folder, self.folder, room, "8b", "cpu")
        with open(self.folder / "log", "w", encoding="utf-8") as log:
            context.begin(log, float("inf"))
            stages.machine.model_room, kept = (lambda *_: room), stages.machine.model_room
            stages.MODEL_BYTES["of this test"] = 1000
            try:
                first, second = context.model("of this test"), context.model("of this test")
            finally:
                stages.machine.model_room = kept
                del stages.MODEL_BYTES["of this test"]
        self.assertEqual((first, first), (second, room / "minitron-gpu-of this test"))
        self.assertEqual((self.folder / "made").read_text(), "of this test\n")
        self.assertEqual([record["kind"] for record in context.records], ["checkpoint"])


if __name__ == "__main__":
    unittest.main()
