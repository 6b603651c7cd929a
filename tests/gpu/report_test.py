#!/usr/bin/env python3
"""report.py: the table is made of what was measured and nothing else, and has a row for every target."""
import pathlib
import sys
import tempfile
import unittest

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent))
import report  # noqa: E402

STEP = {"kind": "step", "weights": "bf16", "kv": "bf16", "launch": "plain", "batch": 64, "context": 512}
LOAD = {"kind": "load", "mode": "steady", "weights": "bf16", "clients": 256, "prompt": 128, "output": 2048,
        "requests": 300, "failed": 0, "tokens_per_s": 13000.0, "ttft_p50_ms": 1, "ttft_p99_ms": 2, "itl_p50_ms": 19.5,
        "itl_p99_ms": 31.25}


class ReportTest(unittest.TestCase):
    def table(self, errors=None, **stages):
        with tempfile.TemporaryDirectory() as folder:
            return report.write(folder, {
                name: {"state": "passed", "seconds": 1, "error": (errors or {}).get(name, ""), "records": records}
                for name, records in stages.items()})

    def test_the_table_has_twenty_rows_and_says_what_was_not_measured(self):
        table = self.table().splitlines()
        self.assertEqual(len(table), 22)
        for row in table[2:]:
            self.assertEqual(row.count("|"), 5)
            self.assertIn("not measured", row)

    def test_every_target_has_a_row(self):
        table = self.table()
        for target in (">= 250", ">= 11,700", "about twice bf16", ">= 42,000", "<= 50 us", ">= 12,800", ">= 8,800",
                       ">= 5,400", "<= 10", "<= 0.03, 0.12, 0.2"):
            self.assertEqual(table.count(f"| {target} |"), 1, target)
        self.assertEqual(table.count("| slower than ours |"), 3)
        self.assertEqual(table.count("fp8 not measured, to be about twice that"), 3)

    def test_results_are_set_against_ceilings_targets_and_peers(self):
        kernel = {"kind": "kernel", "name": "fc1 bf16", "rows": 64, "us": 40.0, "bytes": 136e6, "flop": 1}
        table = self.table(
            ceilings=[{"kind": "ceiling", "name": "read", "gb_per_s": 4000.0}],
            roofline=[kernel, {**kernel, "name": "fc1 bf16, free choice", "us": 32.0},
                      {**kernel, "name": "fc1 bf16, first choice", "us": 50.0}],
            steps=[{**STEP, "ms": 5.0}, {**STEP, "launch": "early", "ms": 4.9}, {**STEP, "launch": "free", "ms": 4.0},
                   {"kind": "prefill", "weights": "bf16", "kv": "bf16", "launch": "plain", "prompt": 2048,
                    "tokens_per_s": 40000.0},
                   {"kind": "prefill", "weights": "bf16", "kv": "bf16", "launch": "free", "prompt": 2048,
                    "tokens_per_s": 50000.0},
                   {**STEP, "weights": "fp8", "kv": "fp8", "ms": 3.0},
                   {**STEP, "weights": "fp8-dynamic", "kv": "fp8", "ms": 2.5},
                   {"kind": "gap", "launch": "plain", "batch": 64, "context": 512, "steps": 299, "idle_p50_us": 4.0,
                    "idle_p99_us": 61.5, "wait_p99_us": 50.0, "forward_us": 4000.0, "sampling_us": 600.0}],
            load=[LOAD, {**LOAD, "weights": "fp8", "tokens_per_s": 25000.0}],
            peers=[{"kind": "peer", "name": "torch, recorded steps", "batch": 64, "context": 512, "tokens_per_s": 6400.0},
                   {"kind": "peer", "name": "torch, compiled steps", "batch": 64, "context": 512, "tokens_per_s": 10000.0},
                   {"kind": "peer_kernel", "name": "torch, matmul fc1", "rows": 64, "us": 45.0}])
        self.assertIn("| fc1 bf16, rows 64 | 40.0 us |  | 85% of the read ceiling; batch invariance costs +25%; against the "
                      "library's first choice -20%; torch, matmul fc1 45.0 us |", table)
        # (7.223e9 * 2 + 64 * 512 * 131072) / 4e12 = 4.685 ms
        self.assertIn("| decode, batch 64, context 512, bf16 | 12,800 tok/s | >= 11,700 | "
                      "94% of the read floor; started early +2.0%; batch invariance costs +25.0% |", table)
        self.assertIn("| prefill, prompts of 2048 | 40,000 tok/s | >= 42,000 | batch invariance costs +25.0% |", table)
        self.assertIn("| decode, batch 64, context 512, weights and KV fp8 | 21,333 tok/s | about twice bf16 | "
                      "1.67 times bf16; fp8-dynamic 25,600 tok/s |", table)
        self.assertIn("| idle between decode graphs, p99, batch 64 | 61.5 us | <= 50 us | p50 4.0 us, of 299 steps |", table)
        self.assertIn("| gRPC, 256 clients, 128/2048 | 13,000 out tok/s | >= 12,800 | ITL p50 19.5, p99 31.2 ms; "
                      "fp8 25,000 out tok/s, to be about 25,600 |", table)
        self.assertIn("| peer: torch, recorded steps, batch 64, context 512 | 10,000 tok/s | slower than ours | "
                      "ours is 1.28 times as fast; as torch, compiled steps |", table)

    def test_a_step_is_set_against_its_kernels_only_when_all_are_there(self):
        names = ("norm", "qkv bf16", "rope", "o bf16", "fc1 bf16", "squared relu", "fc2 bf16", "head bf16")
        kernels = [{"kind": "kernel", "name": name, "rows": 64, "us": 10.0, "bytes": 1, "flop": 1} for name in names]
        attention = {"kind": "kernel", "name": "decode attention bf16", "rows": 64, "context": 512, "us": 10.0, "bytes": 1,
                     "flop": 1}
        steps = [{**STEP, "ms": 5.0}]
        # 65 norms, 32 each of qkv, rope, o, fc1, the activation, fc2 and attention, one head: 290 kernels of 10 us
        self.assertIn("5.000 ms, of which its kernels by themselves 2.900", self.table(
            steps=steps, roofline=[*kernels, attention]))
        self.assertNotIn("by themselves", self.table(steps=steps, roofline=kernels))

    def test_a_stage_that_failed_says_so_in_its_rows(self):
        table = self.table(errors={"steps": "the device failed"}, steps=[])
        self.assertIn("| prefill, prompts of 2048 | not measured | >= 42,000 | steps failed: the device failed |", table)


if __name__ == "__main__":
    unittest.main()
