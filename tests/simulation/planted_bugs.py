#!/usr/bin/env python3
"""Tests the simulator: plants one bug at a time into the scheduler and sees whether the simulation finds it.

    planted_bugs.py check                              every bug still applies to the sources, exactly once
    planted_bugs.py run --build build/release          builds and runs all of them; exit code 1 if one is not found
        --only NAME[,NAME...]    these alone           --first N      the first N that are marked quick
        --seeds N                seeds per bug         --table FILE   rewrites the table between the markers in FILE

The bugs are in planted_bugs.toml: a name, the file, the exact text to replace and its replacement. A bug is built by
compiling the one changed file and linking it in front of the scheduler's library, in a scratch folder; the tree is
never touched. Found means: the simulation or the enumeration reports a violated claim, a CHECK fails, or it hangs.
"""
import argparse
import json
import pathlib
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
import tomllib

ROOT = pathlib.Path(__file__).resolve().parents[2]
BUGS = ROOT / "tests/simulation/planted_bugs.toml"
PROGRAMS = {"swarm": "scheduler_simulation_test", "enumeration": "enumeration_test"}
HANG_SECONDS = 120


def load_bugs():
    bugs = tomllib.loads(BUGS.read_text())["bug"]
    names = [bug["name"] for bug in bugs]
    if len(set(names)) != len(names):
        sys.exit("planted_bugs: two bugs have the same name")
    return bugs


def mutated_source(bug):
    """The text of the changed file, or an explanation why the bug does not apply."""
    path = ROOT / bug["file"]
    if path.suffix != ".cc":
        return None, "only .cc files can be changed: headers are compiled into the tests as well"
    if not path.exists():
        return None, f"{bug['file']} is not there"
    text = path.read_text()
    count = text.count(bug["from"])
    if count != 1:
        return None, f"its text occurs {count} times in {bug['file']}, not once"
    if bug["from"] == bug["to"]:
        return None, "it changes nothing"
    return text.replace(bug["from"], bug["to"]), ""


def check(bugs):
    problems = [f"  {bug['name']}: {why}" for bug in bugs for text, why in [mutated_source(bug)] if text is None]
    if problems:
        sys.exit("planted_bugs: these no longer apply:\n" + "\n".join(problems))
    print(f"planted_bugs: {len(bugs)} bugs apply")


class Builder:
    def __init__(self, build, scratch):
        self.build = build
        self.scratch = scratch
        self.compile = {}
        for entry in json.loads((build / "compile_commands.json").read_text()):
            self.compile[entry["file"]] = entry
        self.link = {}
        for kind, target in PROGRAMS.items():
            commands = subprocess.run(["ninja", "-C", str(build), "-t", "commands", target], check=True,
                                      capture_output=True, text=True).stdout.splitlines()
            self.link[kind] = next(line for line in reversed(commands) if f"-o bin/{target}" in line)

    def build_variant(self, bug, text, kind):
        source = self.scratch / pathlib.Path(bug["file"]).name
        source.write_text(text)
        entry = self.compile[str(ROOT / bug["file"])]
        words = shlex.split(entry["command"])
        while "ccache" in words[0]:
            words = words[1:]
        words[words.index("-o") + 1] = str(self.scratch / "mutant.o")
        words[words.index(str(ROOT / bug["file"]))] = str(source)
        # Nothing of a mutant is measured but how soon it is found; what it leaves unused is no concern.
        words = [w for w in words if w not in ("-Werror", "-MD")] + ["-O1", "-w"]
        for flag in ("-MT", "-MF"):
            if flag in words:
                at = words.index(flag)
                del words[at:at + 2]
        subprocess.run(words, cwd=entry["directory"], check=True)
        program = PROGRAMS[kind]
        binary = self.scratch / program
        line = self.link[kind].replace(f"-o bin/{program}", f"{self.scratch / 'mutant.o'} -o {binary}")
        subprocess.run(line, shell=True, cwd=self.build, check=True, stdout=subprocess.DEVNULL)
        return binary


def run_variant(binary, seeds):
    """(found, seed or None, seconds, what was said)"""
    start = time.monotonic()
    arguments = [str(binary), "--gtest_filter=*EverySeed*:*EveryInterleaving*", "--gtest_color=no"]
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                               env={"MINITRON_SIM_SEEDS": str(seeds), "PATH": "/usr/bin:/bin"})
    hung = False
    try:
        output, _ = process.communicate(timeout=HANG_SECONDS)
    except subprocess.TimeoutExpired:
        hung = True
        process.send_signal(signal.SIGABRT)  # prints the seed
        try:
            output, _ = process.communicate(timeout=5)
        except subprocess.TimeoutExpired:
            process.kill()
            output, _ = process.communicate()
    seconds = time.monotonic() - start
    seed = re.search(r"MINITRON_SIM_SEED=(\d+)", output)
    said = re.search(r"violated: (.*)", output) or re.search(r"(CHECK failed[^\n]*)", output)
    # A rare state that was not reached is no find: a bug has to show as a broken claim.
    found = hung or seed is not None or (process.returncode not in (0, None) and said is not None)
    what = "hangs" if hung and said is None else said.group(1) if said else f"exit code {process.returncode}"
    what = re.sub(r"/\S*/", "", what)  # the scratch folder
    return found, int(seed.group(1)) if seed else None, seconds, re.sub(r"[\s\d]+$", "", what)[:90]


def run(bugs, build, seeds):
    rows = []
    for bug in bugs:
        text, why = mutated_source(bug)
        if text is None:
            sys.exit(f"planted_bugs: {bug['name']}: {why}")
        found, seed, seconds, what, kind = False, None, 0.0, "", "-"
        with tempfile.TemporaryDirectory(prefix="planted_bug_") as folder:
            builder = Builder(build, pathlib.Path(folder))
            for kind in bug.get("by", "swarm").split(","):
                binary = builder.build_variant(bug, text, kind)
                found, seed, seconds, what = run_variant(binary, seeds)
                if found:
                    break
        verdict = f"{kind}, seed {seed}" if seed is not None else kind
        print(f"{'found' if found else 'NOT FOUND':9} {seconds:6.2f} s  {verdict:20} {bug['name']}: {what}", flush=True)
        rows.append((bug, found, kind, seed, seconds, what))
    return rows


def write_table(path, rows, seeds):
    lines = ["| planted bug | found by | seeds until found | seconds | what was violated |", "|---|---|---|---|---|"]
    for bug, found, kind, seed, seconds, what in rows:
        lines.append(f"| {bug['name']} | {kind if found else '**not found**'} | "
                     f"{seed if seed is not None else '-'} | {seconds:.2f} | {what.replace('|', '/')} |")
    times = sorted(row[4] for row in rows)
    num_found = sum(row[1] for row in rows)
    lines.append("")
    lines.append(f"{num_found} of {len(rows)} found with at most {seeds} seeds; median {times[len(times) // 2]:.2f} s, "
                 f"longest {times[-1]:.2f} s, without building.")
    text = path.read_text()
    begin, end = "<!-- planted bugs begin -->", "<!-- planted bugs end -->"
    if begin not in text or end not in text:
        sys.exit(f"planted_bugs: {path} has no markers")
    head, tail = text.split(begin)[0], text.split(end)[1]
    path.write_text(head + begin + "\n" + "\n".join(lines) + "\n" + end + tail)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["check", "run"])
    parser.add_argument("--build", type=pathlib.Path, default=ROOT / "build/release")
    parser.add_argument("--only", default="")
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--seeds", type=int, default=6000)
    parser.add_argument("--table", type=pathlib.Path)
    arguments = parser.parse_args()
    bugs = load_bugs()
    check(bugs)
    if arguments.command == "check":
        return
    if arguments.only:
        wanted = arguments.only.split(",")
        bugs = [bug for bug in bugs if bug["name"] in wanted]
        if len(bugs) != len(wanted):
            sys.exit("planted_bugs: --only names a bug that is not there")
    if arguments.first:
        bugs = [bug for bug in bugs if bug.get("quick")][:arguments.first]
    rows = run(bugs, arguments.build.resolve(), arguments.seeds)
    if arguments.table:
        write_table(arguments.table, rows, arguments.seeds)
    missed = [row[0]["name"] for row in rows if not row[1]]
    if missed:
        sys.exit("planted_bugs: NOT found: " + ", ".join(missed))


if __name__ == "__main__":
    main()
