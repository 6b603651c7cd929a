#!/usr/bin/env python3
"""Reading what the programs print, and the tables: numbers go where they belong, and what is missing is noticed."""
import json
import pathlib
import sys
import unittest

sys.dont_write_bytecode = True
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent))

import results  # noqa: E402

ENGINE = """target AVX3_DL, 2 threads
limits: read 50.0 GB/s, fp32 FMA 518.7 GFLOP/s
model int8: ready in 1.59 s, resident 1680 MiB
  int8   prefill  128         234.20 tok/s   67 % of FMA
  int8   decode batch  1      27.92 tok/s   90 % of read
  int8   decode batch  8     148.38 tok/s   60 % of read
  int8   resident 1893 MiB (file-backed 1764 MiB)
"""
HEADER = """
|    PP |     TG |    B |   N_KV |   T_PP s | S_PP t/s |   T_TG s | S_TG t/s |      T s |    S t/s |
|-------|--------|------|--------|----------|----------|----------|----------|----------|----------|
"""
ROWS = """|   128 |     16 |    1 |    144 |    0.394 |   324.65 |    0.626 |    25.57 |    1.020 |   141.19 |
|   128 |     16 |    1 |    144 |    0.364 |   351.49 |    0.612 |    26.13 |    0.977 |   147.46 |
|   128 |     16 |    8 |   1152 |    0.365 |   350.35 |    1.008 |   127.03 |    1.373 |   186.46 |
"""
CALM = (results.Limits(50.0, 500.0), results.Limits(51.0, 510.0), results.Limits(50.5, 505.0))


def pair(weight_format="bf16", ours=(30.0, 150.0, 200.0), peer=(20.0, 120.0, 400.0), probes=CALM):
    return results.Pair(weight_format, results.Rates(ours, (90.0, 60.0, 70.0)), results.Rates(peer), probes)


def rows(table):
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()]
    return {row[0]: row[1:] for row in cells if row}


class Parsing(unittest.TestCase):
    def test_the_engines_rates_and_shares_are_in_the_order_of_the_measures(self):
        self.assertEqual(results.parse_engine(ENGINE), results.Rates((27.92, 148.38, 234.2), (90, 60, 67)))

    def test_the_engines_limits_are_read(self):
        self.assertEqual(results.parse_limits(ENGINE), results.Limits(50.0, 518.7))

    def test_a_missing_rate_or_limit_is_an_error(self):
        for gone in ("prefill", "batch  1 ", "batch  8 "):
            with self.assertRaises(results.UnreadableOutputError, msg=gone):
                results.parse_engine(ENGINE.replace(gone, "nothing"))
        with self.assertRaises(results.UnreadableOutputError):
            results.parse_limits(ENGINE.replace("limits:", ""))

    def test_a_batch_of_16_is_not_taken_for_one_of_1(self):
        with self.assertRaises(results.UnreadableOutputError):
            results.parse_engine(ENGINE.replace("batch  1 ", "batch 16 "))

    def test_the_peers_rows_become_medians_per_measure(self):
        rates = results.parse_batched_bench("some log | line\n" + HEADER + ROWS)
        self.assertEqual([round(r, 3) for r in rates.tokens], [25.85, 127.03, 350.35])

    def test_rows_of_another_run_are_an_error(self):
        for other in (ROWS.replace("|   128 |", "|   256 |", 1), ROWS.replace("|    8 |", "|    4 |")):
            with self.assertRaises(results.UnreadableOutputError):
                results.parse_batched_bench(HEADER + other)

    def test_a_table_that_breaks_off_is_an_error(self):
        with self.assertRaises(results.UnreadableOutputError):
            results.parse_batched_bench(HEADER + "".join(ROWS.splitlines(keepends=True)[:2]))

    def test_a_pair_survives_the_log(self):
        self.assertEqual(results.from_json(results.to_json(pair())), pair())


class Tables(unittest.TestCase):
    def test_ratios_are_ours_over_the_peers_against_the_target(self):
        found = rows(results.table([pair()], "llama.cpp", 1.2))
        decode, prompt = found["bf16, decode, 1 sequence"], found["bf16, prompt of 128"]
        self.assertEqual(decode, ["30.0", "20.0", "1.50", "1.50 to 1.50", "1.3", "yes", "90 % of read"])
        self.assertEqual(prompt, ["200", "400", "0.50", "0.50 to 0.50", "1.25", "no", "70 % of FMA"])

    def test_the_ratio_is_the_median_of_the_pairs_ratios(self):
        pairs = [pair(ours=(ours, 1.0, 1.0), peer=(peer, 1.0, 1.0)) for ours, peer in ((10, 10), (30, 10), (40, 20))]
        found = rows(results.table(pairs, "llama.cpp", 1.2))["bf16, decode, 1 sequence"]
        self.assertEqual(found[:4], ["30.0", "10.0", "2.00", "1.00 to 3.00"])

    def test_a_pair_under_which_a_limit_flipped_is_dropped_and_reported(self):
        for flip in (results.Limits(30.0, 500.0), results.Limits(50.0, 400.0)):
            table = results.table([pair(), pair(peer=(1.0, 1.0, 1.0), probes=(*CALM, flip))], "llama.cpp", 1.2)
            self.assertEqual(rows(table)["bf16, decode, 1 sequence"][3], "1.50 to 1.50")
            self.assertIn("bf16 1 pairs (1 more dropped)", table)

    def test_a_format_without_a_pair_that_counts_has_no_row_and_is_reported(self):
        table = results.table([pair("int4", probes=(*CALM, results.Limits(10.0, 500.0)))], "llama.cpp", 1.2)
        self.assertNotIn("int4 / Q4_0", table)
        self.assertIn("int4 0 pairs (1 more dropped)", table)

    def test_another_peer_is_to_be_reached(self):
        found = rows(results.table([pair("int4")], "ik_llama.cpp", 1.2))
        self.assertEqual(found["int4 / Q4_0, decode, 8 sequences"][4:6], ["1", "yes"])
        self.assertEqual(found["int4 / Q4_0, prompt of 128"][4:6], ["1", "no"])


class Serving(unittest.TestCase):
    RUN = {
        "num_prompts": 2, "completed": 2, "output_throughput": 50.0, "median_ttft_ms": 2500.0, "p99_itl_ms": 900.0,
        "itls": [[0.1, 0.2], [1.5, 0.1]],
    }  # fmt: skip

    def test_the_worst_gap_is_over_all_streams(self):
        self.assertEqual(results.parse_served(json.dumps(self.RUN)), results.Served(50.0, 2.5, 0.9, 1.5))

    def test_a_run_with_a_failed_request_is_an_error(self):
        with self.assertRaises(results.UnreadableOutputError):
            results.parse_served(json.dumps({**self.RUN, "completed": 1}))

    def test_each_target_is_judged(self):
        ours, peer = results.Served(50.0, 2.5, 0.9, 1.5), results.Served(20.0, 13.0, 5.0, 6.0)
        found = rows(results.served_table([ours], [peer], "llama-server", 1.6))
        self.assertEqual(found["tokens/s"][-2:], ["2 x, is 2.50 x", "yes"])
        self.assertEqual([found[name][-1] for name in ("first token, median, s", "longest gap, s")], ["yes", "yes"])
        slow = results.Served(30.0, 6.5, 0.9, 1.7)
        found = rows(results.served_table([slow], [peer], "llama-server", 1.6))
        self.assertEqual([found[n][-1] for n in ("tokens/s", "first token, median, s", "longest gap, s")], ["no"] * 3)

    def test_one_long_gap_in_one_run_misses_the_target(self):
        good, bad = results.Served(50.0, 2.5, 0.9, 0.5), results.Served(50.0, 2.5, 0.9, 2.0)
        self.assertEqual(rows(results.served_table([good, good, bad], [good], "x", 1.6))["longest gap, s"][-1], "no")


if __name__ == "__main__":
    unittest.main()
