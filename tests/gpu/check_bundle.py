#!/usr/bin/env python3
"""Checks a folder that make_bundle.sh made, without a GPU: that it can work on a machine that has only glibc and CUDA.

Usage: check_bundle.py BUNDLE_DIR. Prints every problem and fails if there is one."""
import os
import re
import subprocess
import sys

LIMIT_BYTES = 60 * 1000 * 1000
OLDEST_GLIBC = (2, 36)
TESTS = {"cuda_tests_gpu"}
CLIENTS = {"minitron-server", "minitron"}
TOOLS = {"minitron-gpu-bench", "minitron-gpu-load", "minitron-make-checkpoint"}
PROGRAMS = TESTS | CLIENTS | TOOLS
SCRIPTS = {"run.sh", "run.py", "machine.py", "stages.py", "serving.py", "report.py", "details.py", "layers_check.py",
           "nemotron_torch.py", "peers.py", "commit"}
# The C library and its loader belong to the machine, and must match each other.
OF_THE_MACHINE = re.compile(r"^(linux-vdso|ld-linux[^/]*|libc|libm|libdl|librt|libpthread|libresolv)\.so")
OF_CUDA = re.compile(r"^lib(cuda|cudart|cublas|cublasLt|nvrtc|nvidia[^/]*)\.so")


def files_below(folder):
    for path, _, names in os.walk(folder):
        for name in names:
            yield os.path.join(path, name)


def is_elf(path):
    with open(path, "rb") as file:
        return file.read(4) == b"\x7fELF"


def size_problems(bundle):
    total = sum(os.path.getsize(path) for path in files_below(bundle))
    print(f"gpu-bundle: {total / 1e6:.1f} MB in {bundle}")
    return [f"{total} bytes, over {LIMIT_BYTES}"] if total > LIMIT_BYTES else []


def library_problems(bundle, elf):
    """Every library an ELF file needs is in the bundle, or the C library's own."""
    lib = os.path.join(bundle, "lib")
    listing = subprocess.run(["ldd", elf], env={"PATH": os.environ["PATH"], "LD_LIBRARY_PATH": lib},
                             capture_output=True, text=True)
    problems = [] if listing.returncode == 0 else [f"{elf}: ldd: {listing.stderr.strip()}"]
    for line in listing.stdout.splitlines():
        if line.strip() == "statically linked":  # needs nothing
            continue
        name = os.path.basename(line.split()[0])
        found = re.search(r"=> (/\S+)", line)
        if OF_CUDA.match(name):
            problems.append(f"{elf} links {name}: the program would not start where there is none")
        elif OF_THE_MACHINE.match(name):
            continue
        elif found is None or os.path.dirname(found.group(1)) != lib:
            problems.append(f"{elf}: {line.strip()}: not the bundle's")
    return problems


def glibc_problems(elf):
    """No symbol of a glibc newer than the oldest one promised."""
    command = ["readelf", "--wide", "--version-info", elf]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    versions = {tuple(map(int, version.split("."))) for version in re.findall(r"GLIBC_(\d+\.\d+)", text)}
    return [f"{elf} needs glibc {'.'.join(map(str, v))}" for v in sorted(versions) if v > OLDEST_GLIBC]


def run(bundle, *command):
    """Runs a program of the bundle with no environment but the bundle's libraries."""
    return subprocess.run([os.path.join(bundle, "bin", command[0]), *command[1:]], cwd=bundle, capture_output=True,
                          text=True, timeout=60, env={"LD_LIBRARY_PATH": os.path.join(bundle, "lib")})


def start_problems(bundle):
    """Every program starts; without a device the server says so in one line and ends."""
    problems = []
    for program in sorted(PROGRAMS):
        options = ["--gtest_list_tests"] if program in TESTS else ["--version"] if program in CLIENTS else []
        result = run(bundle, program, *options)
        expected = 2 if program in TOOLS else 0  # a tool without arguments says how it is used
        if result.returncode != expected or not (result.stdout or "usage:" in result.stderr):
            problems.append(f"{program} {options}: status {result.returncode}: {result.stderr.strip()}")
    model = os.path.join(bundle, "deploy", "models", "minitron-tiny")
    if not os.path.exists("/dev/nvidia0"):
        result = run(bundle, "minitron-server", "--model", model, "--backend", "cuda", "--port", "0")
        if result.returncode == 0 or "cuda" not in result.stderr:
            problems.append(f"minitron-server without a device: status {result.returncode}: {result.stderr}")
    return problems


def main():
    bundle = os.path.realpath(sys.argv[1])
    there = set(os.listdir(os.path.join(bundle, "bin")))
    problems = [f"{name} is missing" for name in sorted(PROGRAMS - there)]
    problems += [f"{name} does not belong there" for name in sorted(there - PROGRAMS)]
    problems += [f"{name} is missing" for name in sorted(SCRIPTS) if not os.path.exists(os.path.join(bundle, name))]
    problems += size_problems(bundle)
    elfs = [path for path in files_below(bundle) if is_elf(path)]
    for elf in elfs:
        if OF_CUDA.match(os.path.basename(elf)) or OF_THE_MACHINE.match(os.path.basename(elf)):
            problems.append(f"{elf}: the machine's own is the one to use")
        problems += library_problems(bundle, elf) + glibc_problems(elf)
    if not problems:
        problems = start_problems(bundle)
    for problem in problems:
        print(f"gpu-bundle: {problem}", file=sys.stderr)
    print(f"gpu-bundle: {len(elfs)} programs and libraries checked, {len(problems)} problems")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
