#!/usr/bin/env python3
"""Runs a benchmark and puts what it prints between the markers of its name in tests/bench/README.md.

    update_readme.py [--readme FILE] NAME COMMAND [ARGUMENT...]

With --readme the command is a test of this tree, and of what it prints only the rows of tables are taken.

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
    changed = subprocess.run([*git, "diff", "--quiet", "HEAD", "--", ".", ":!*README.md"]).returncode
    return name.strip() + ("-dirty" if changed else "")


def main():
    arguments, readme = sys.argv[1:], README
    is_test = arguments[0] == "--readme"
    if is_test:
        readme, arguments = ROOT / arguments[1], arguments[2:]
    name, command = arguments[0], arguments[1:]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    if is_test:
        output = "\n".join(line for line in output.splitlines() if line.startswith("|"))
    begin, end = f"<!-- {name} begin -->", f"<!-- {name} end -->"
    text = readme.read_text()
    if begin not in text or end not in text:
        sys.exit(f"update_readme: {readme} has no markers for {name}")
    print(output)
    origin = f"`{shlex.join(command)}`" + ("" if is_test else f", commit {commit()}, {processor()}")
    block = f"{begin}\n{output}\n\n{origin}\n{end}"
    readme.write_text(text.split(begin)[0] + block + text.split(end, 1)[1])


if __name__ == "__main__":
    main()
