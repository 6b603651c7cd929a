#!/usr/bin/env python3
"""The shipped program as a file: how it was hardened, and what it needs at run time. Reads the ELF, trusts no flag."""
import os
import re
import subprocess
import sys
import unittest

sys.path.insert(0, os.path.dirname(__file__))
from harness import SERVER


def readelf(*options):
    return subprocess.run(["readelf", "--wide", *options, SERVER], capture_output=True, text=True, check=True).stdout


class HardeningTest(unittest.TestCase):
    def test_it_is_position_independent(self):
        self.assertIn("DYN (Position-Independent Executable file)", readelf("--file-header"))
        self.assertRegex(readelf("--dynamic"), r"\(FLAGS_1\).*\bPIE\b")

    def test_relocations_are_read_only_and_bound_at_start(self):
        self.assertIn("GNU_RELRO", readelf("--program-headers"))
        self.assertRegex(readelf("--dynamic"), r"\(FLAGS\).*\bBIND_NOW\b|\(FLAGS_1\).*\bNOW\b")

    def test_stack_and_data_cannot_run_and_code_cannot_be_written(self):
        headers = readelf("--program-headers")
        self.assertRegex(headers, r"GNU_STACK\s.*\sRW\s")
        self.assertNotRegex(headers, r"LOAD\s.*\sRWE\s")

    def test_stacks_are_guarded_and_library_calls_checked(self):
        symbols = readelf("--dyn-syms")
        self.assertIn("__stack_chk_fail", symbols)
        self.assertRegex(symbols, r"\b__\w+_chk\b")  # FORTIFY

    def test_the_containers_of_the_standard_library_check_their_bounds(self):
        self.assertIn("__glibcxx_assert_fail", readelf("--dyn-syms"))

    def test_no_library_path_is_built_in(self):
        self.assertNotRegex(readelf("--dynamic"), r"RPATH|RUNPATH")


if __name__ == "__main__":
    unittest.main()
