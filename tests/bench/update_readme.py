#!/usr/bin/env python3
"""Runs a benchmark and puts what it prints between the markers of its name in tests/bench/README.md.

    update_readme.py NAME COMMAND [ARGUMENT...]

Below the table come the command, the commit and the processor, so that a number says where it is from.
"""
import pathlib
import shlex
import subprocess
import sys

README = pathlib.Path(__file__).resolve().parent / "README.md"
ROOT = README.parents[2]


def processor():
    for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return "unknown processor"


def commit():
    """Of the sources that were measured: what this script changes itself does not make them differ from it."""
    git = ["git", "-C", str(ROOT)]
    name = subprocess.run([*git, "rev-parse", "--short", "HEAD"], check=True, capture_output=True, text=True).stdout
    changed = subprocess.run([*git, "diff", "--quiet", "HEAD", "--", ".", ":!tests/bench/README.md"]).returncode
    return name.strip() + ("-dirty" if changed else "")


def main():
    name, command = sys.argv[1], sys.argv[2:]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    begin, end = f"<!-- {name} begin -->", f"<!-- {name} end -->"
    text = README.read_text()
    if begin not in text or end not in text:
        sys.exit(f"update_readme: {README} has no markers for {name}")
    print(output)
    block = f"{begin}\n{output}\n\n`{shlex.join(command)}`, commit {commit()}, {processor()}\n{end}"
    README.write_text(text.split(begin)[0] + block + text.split(end, 1)[1])


if __name__ == "__main__":
    main()
