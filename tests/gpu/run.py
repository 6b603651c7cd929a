#!/usr/bin/env python3
"""Runs the stages of the GPU test and prints the table of its results.

    run.py [--bundle DIR] [--out DIR] [--work DIR] [--budget SECONDS] [--resume FILE] [--redo STAGE]... [STAGE...]
    run.py --preflight      says within seconds what the machine has of what the stages want

OUT gets few and small files: results.json (every record; what a later run goes on from, also on another machine), the
table as <device>-<commit>.md, logs.txt, and the products' timed choices. WORK gets the rest. A stage that passed is not
repeated. One that failed keeps what it measured, and is run again. One that no longer fits into the budget is left for
the next run. Nothing but the standard library.
"""
import argparse
import json
import os
import pathlib
import shutil
import sys
import time

import machine
import report
import serving
import stages

HERE = pathlib.Path(__file__).resolve().parent
LOG_BYTES = 300_000  # of a stage: its beginning and its end

# In order of what they are worth. Seconds: what a stage has to be left with to be begun, and what it may take.
STAGES = {
    "device": (stages.device, 3, 40),
    "kernels": (stages.kernels, 20, 90),
    "serve": (serving.serve, 8, 40),
    "ceilings": (stages.ceilings, 6, 40),
    "model": (stages.model, 20, 90),
    "steps": (stages.steps_of("none", "bf16", "plain"), 25, 90),
    "layers": (stages.layers, 25, 90),
    "load": (serving.load, 70, 170),
    "roofline": (stages.roofline, 25, 90),
    "peers": (serving.peers, 60, 170),
    "steps-early": (stages.steps_of("none", "bf16", "early"), 20, 60),
    "steps-free": (stages.steps_of("none", "bf16", "free"), 20, 60),
    "steps-fp8": (stages.steps_of("fp8", "fp8", "plain"), 25, 80),
    "closed": (serving.closed, 35, 90),
    "load-fp8": (serving.load_fp8, 50, 120),
    "sanitizer": (stages.sanitizer, 30, 120),
    "poisson": (serving.poisson, 40, 90),
    "steps-fp8-dynamic": (stages.steps_of("fp8-dynamic", "fp8", "plain", points="brief"), 15, 60),
    "steps-int8": (stages.steps_of("int8", "bf16", "plain", points="brief"), 15, 60),
    "steps-int4": (stages.steps_of("int4", "bf16", "plain", points="brief"), 15, 60),
    "ncu": (stages.ncu, 20, 120),
}


class State:
    """OUT/results.json: every stage's records and how it ended; written after each stage."""

    def __init__(self, path, resume):
        self.path, self.stages = path, {}
        source = pathlib.Path(resume) if resume else path
        if source.exists():
            self.stages = json.loads(source.read_text())["stages"]

    def passed(self, name):
        return self.stages.get(name, {}).get("state") == "passed"

    def records(self):
        return {name: stage["records"] for name, stage in self.stages.items()}

    def keep(self, name, records, seconds, error):
        """What is left of a stage. A failure that measured nothing does not take away what was measured before."""
        skipped = bool(records) and all(record["kind"] in ("skipped", "checkpoint", "note") for record in records)
        if error and not records:
            records = self.stages.get(name, {}).get("records", [])
        state = "failed" if error else "skipped" if skipped else "passed"
        self.stages[name] = {"state": state, "seconds": round(seconds, 2), "error": error, "records": records}
        self.write()
        return state

    def write(self):
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text(json.dumps({"commit": report.commit(), "stages": self.stages}, indent=1))
        temporary.rename(self.path)


def append_log(out, name):
    """The stage's log behind the others', without the middle of a long one."""
    current = out / "current.log"
    text = current.read_text(errors="replace")
    if len(text) > LOG_BYTES:
        text = f"{text[:LOG_BYTES // 2]}\n[...]\n{text[-LOG_BYTES // 2:]}"
    with open(out / "logs.txt", "a", encoding="utf-8") as logs:
        logs.write(f"===== {name} =====\n{text}\n")
    current.unlink()


def run_stage(context, state, name, most_s):
    """Runs one stage. Returns whether it did not fail."""
    begin, error = time.monotonic(), ""
    context.results = state.records()
    with open(context.out / "current.log", "w", encoding="utf-8") as log:
        context.begin(log, begin + most_s)
        try:
            STAGES[name][0](context)
        except Exception as caught:  # whatever it is, the stages to come are not to be lost
            error = str(caught) if isinstance(caught, stages.StageError) else f"{type(caught).__name__}: {caught}"
            log.write(f"failed: {error}\n")
    seconds = time.monotonic() - begin
    end = state.keep(name, context.records, seconds, error)
    append_log(context.out, name)
    why = "; ".join(record["why"] for record in context.records if record["kind"] == "skipped")
    if end == "failed":
        print(f"gpu: {name} FAILED in {seconds:.0f} s: {error}; see {context.out}/logs.txt", flush=True)
    elif end == "skipped":
        print(f"gpu: {name} skipped: {why}", flush=True)
    else:
        print(f"gpu: {name} passed in {seconds:.0f} s{f'; without {why}' if why else ''}", flush=True)
    choices = context.work / "minitron-cublaslt.txt"
    if choices.exists():
        shutil.copy(choices, context.out)
    table(context, state)
    return end != "failed"


def table(context, state):
    """The table so far. What it cannot make of a record must not cost the stages to come; results.json has it all."""
    try:
        return report.write(context.out, state.stages)
    except Exception as error:
        return f"gpu: no table: {type(error).__name__}: {error}; results.json has the records"


def preflight(options):
    missing = 0
    for good, needed, what, text in machine.preflight(options.bundle, options.out, options.work,
                                                      stages.MODEL_BYTES["8b"]):
        missing += needed and not good
        print(f"gpu: {'ok  ' if good else 'MISSING' if needed else 'without'} {what}: {text}")
    print(f"gpu: {missing} of what is needed {'is' if missing == 1 else 'are'} missing")
    return 1 if missing else 0


def parse():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    bundle = HERE if (HERE / "bin").exists() else HERE.parents[1] / "build" / "gpu-bundle"
    parser.add_argument("--bundle", type=pathlib.Path, default=bundle)
    parser.add_argument("--out", type=pathlib.Path, default=os.environ.get("OUT", "minitron-gpu"))
    parser.add_argument("--work", type=pathlib.Path, default=f"/tmp/minitron-gpu-{os.getuid()}")
    parser.add_argument("--budget", type=float, default=560, help="seconds of this run, the last stage's end included")
    parser.add_argument("--resume", help="results.json of a run before; default: OUT's own")
    parser.add_argument("--shape", choices=["8b", "tiny"], default="8b")
    parser.add_argument("--backend", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--redo", action="append", default=[], help="a stage to repeat although it passed")
    parser.add_argument("--preflight", action="store_true", help="look at the machine, run nothing")
    parser.add_argument("stages", nargs="*")
    options = parser.parse_args()
    unknown = [name for name in options.stages + options.redo if name not in STAGES]
    if unknown:
        parser.error(f"no stage {unknown[0]}; there are {', '.join(STAGES)}")
    if options.resume and not pathlib.Path(options.resume).exists():
        parser.error(f"--resume {options.resume}: no such file")
    return options


def main():
    begin, options, failed = time.monotonic(), parse(), 0
    for folder in (options.out, options.work):
        folder.mkdir(parents=True, exist_ok=True)
    if options.preflight:
        return preflight(options)
    context = stages.Context(options.bundle, options.out, options.work, options.shape, options.backend)
    state = State(context.out / "results.json", options.resume)
    for name in options.stages or STAGES:
        if state.passed(name) and name not in options.redo:
            print(f"gpu: {name} passed before")
            continue
        left = begin + options.budget - time.monotonic()
        if left < STAGES[name][1]:
            print(f"gpu: {name} left for the next run: {left:.0f} of {options.budget:.0f} s are left")
            continue
        failed += not run_stage(context, state, name, min(STAGES[name][2], left))
    print(table(context, state))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
