#!/usr/bin/env python3
"""What a machine has of what the GPU test needs: programs, libraries, Python packages, room for a model.

    machine.py --probe LIBRARY      loads the driver and cublasLt and prints what they say, as JSON

Nothing but the standard library; every look takes a moment, and the ones that load a library are made in a process of
their own.
"""
import ctypes
import glob
import importlib.util
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys

PACKAGES = {"torch": "layers, peers", "transformers": "layers, peers", "flashinfer": "a kernel peer"}
PROGRAMS = {"nvidia-smi": "clocks and load", "compute-sanitizer": "sanitizer", "ncu": "ncu"}
CUDA_FOLDERS = ("/usr/local/cuda", *sorted(glob.glob("/usr/local/cuda-*"), reverse=True))
PROGRAM_FOLDERS = tuple(f"{folder}/bin" for folder in CUDA_FOLDERS) + (
    "/usr/local/nvidia/bin", *sorted(glob.glob("/opt/nvidia/nsight-compute/*"), reverse=True))
GIB = 1 << 30


def find_program(name):
    """The path of a tool of CUDA's, on the PATH or where toolkits put it; None when it is not here."""
    found = shutil.which(name)
    for folder in () if found else PROGRAM_FOLDERS:
        if os.access(f"{folder}/{name}", os.X_OK):
            return f"{folder}/{name}"
    return found


def library_folders():
    """Where CUDA's libraries may be, best first: the toolkit's, the driver's, those of Python's packages."""
    folders = [folder for folder in os.environ.get("LD_LIBRARY_PATH", "").split(":") if folder]
    folders += [f"{folder}/lib64" for folder in CUDA_FOLDERS]
    folders += [path for folder in CUDA_FOLDERS for path in glob.glob(f"{folder}/targets/*/lib")]
    folders += ["/usr/local/nvidia/lib64", "/usr/lib/x86_64-linux-gnu", "/usr/lib64"]
    folders += [path for entry in sys.path for path in sorted(glob.glob(f"{entry}/nvidia/*/lib"), reverse=True)]
    return folders


def find_library(name):
    """The folder of a library; None when no folder has it."""
    return next((folder for folder in library_folders() if os.path.exists(f"{folder}/{name}")), None)


def cublaslt_name(bundle):
    """The name by which the bundle's server loads the library of the products."""
    try:
        found = re.search(rb"libcublasLt\.so\.\d+", (pathlib.Path(bundle) / "bin" / "minitron-server").read_bytes())
    except OSError:
        return "libcublasLt.so"
    return found.group().decode() if found else "libcublasLt.so"


def loader_path(bundle):
    """LD_LIBRARY_PATH of the bundle's programs: its own libraries first, CUDA's from where they are."""
    folders = [str(pathlib.Path(bundle) / "lib"), *os.environ.get("LD_LIBRARY_PATH", "").split(":")]
    for name in ("libcuda.so.1", cublaslt_name(bundle)):
        folder = find_library(name)
        if folder is not None and folder not in folders:
            folders.append(folder)
    return ":".join(folder for folder in folders if folder)


def memory_available():
    """Bytes of memory that may still be taken."""
    found = re.search(r"^MemAvailable:\s+(\d+)", pathlib.Path("/proc/meminfo").read_text(), re.MULTILINE)
    return int(found.group(1)) * 1024 if found else 0


def model_room(num_bytes, work):
    """A folder with room for a model: in memory where that has it twice over, else on a disk; None when none has."""
    for folder in ("/dev/shm", str(work), "/tmp", "/var/tmp"):
        if not os.path.isdir(folder) or shutil.disk_usage(folder).free < num_bytes * 1.02:
            continue
        if folder != "/dev/shm" or memory_available() > 2 * num_bytes:
            return pathlib.Path(folder)
    return None


def probe(library):
    """What the driver and the library of the products say of themselves."""
    found = {}
    try:
        products = ctypes.CDLL(library)
        products.cublasLtGetVersion.restype = ctypes.c_size_t
        found["cublaslt"] = products.cublasLtGetVersion()
    except OSError as error:
        found["cublaslt_error"] = str(error)
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        return {**found, "error": str(error)}
    version = ctypes.c_int()
    driver.cuDriverGetVersion(ctypes.byref(version))
    found["driver_cuda"] = version.value
    error = driver.cuInit(0)
    count = ctypes.c_int()
    if error == 0:
        driver.cuDeviceGetCount(ctypes.byref(count))
    found.update({"init": error, "devices": count.value})
    if count.value > 0:
        name, memory = ctypes.create_string_buffer(256), ctypes.c_size_t()
        driver.cuDeviceGetName(name, 256, 0)
        driver.cuDeviceTotalMem_v2(ctypes.byref(memory), 0)
        found.update({"name": name.value.decode(), "memory_mib": memory.value / (1 << 20)})
    return found


def run_probe(bundle):
    """probe() in a process of its own, with the libraries the bundle's programs would get."""
    environment = {**os.environ, "LD_LIBRARY_PATH": loader_path(bundle)}
    try:
        result = subprocess.run([sys.executable, __file__, "--probe", cublaslt_name(bundle)], env=environment,
                                capture_output=True, text=True, timeout=30)
    except subprocess.TimeoutExpired:
        return {"error": "the driver does not answer within 30 s"}
    if result.returncode != 0:
        return {"error": (result.stderr.strip().splitlines() or ["no message"])[-1]}
    return json.loads(result.stdout)


def program_lines(bundle):
    """Whether the bundle's programs start."""
    environment = {**os.environ, "LD_LIBRARY_PATH": loader_path(bundle)}
    for name, option in (("minitron-server", "--version"), ("cuda_tests_gpu", "--gtest_list_tests"),
                         ("minitron-gpu-bench", "")):
        try:
            result = subprocess.run([f"{bundle}/bin/{name}", *filter(None, [option])], env=environment,
                                    capture_output=True, text=True, timeout=20)
            good = result.returncode in (0, 2) and bool(result.stdout or "usage:" in result.stderr)
            yield good, name, "starts" if good else f"status {result.returncode}: {result.stderr.strip()[-200:]}"
        except (OSError, subprocess.TimeoutExpired) as error:
            yield False, name, f"does not start: {error}"


def preflight(bundle, out, work, model_bytes):
    """(is there, needed, what, text) for everything the stages want."""
    lines = [(good, True, name, text) for good, name, text in program_lines(bundle)]
    found = run_probe(bundle)
    lines.append((found.get("devices", 0) > 0, True, "device",
                  found.get("error") or f"{found.get('name', 'none')}, {found.get('memory_mib', 0) / 1024:.0f} GiB; "
                  f"driver for CUDA {found.get('driver_cuda', 0) / 1000:.1f}; cuInit {found.get('init')}"))
    library = cublaslt_name(bundle)
    lines.append(("cublaslt" in found, True, library, f"version {found['cublaslt']}, {find_library(library) or 'ldconfig'}"
                  if "cublaslt" in found else found.get("cublaslt_error", "not tried")))
    for name, purpose in PROGRAMS.items():
        path = find_program(name)
        lines.append((path is not None, False, name, path or f"not here: {purpose}"))
    for name, purpose in PACKAGES.items():
        here = importlib.util.find_spec(name) is not None
        lines.append((here, False, f"python {name}", "here" if here else f"not here: {purpose}"))
    room = model_room(model_bytes, work)
    lines.append((room is not None, True, "room for a model", f"{model_bytes / GIB:.1f} GiB in {room}" if room else
                  f"no folder has {model_bytes / GIB:.1f} GiB: load, peers, steps-*"))
    writable = os.access(out, os.W_OK)
    lines.append((writable, True, "results", f"{out}" if writable else f"{out} cannot be written"))
    lines.append((True, False, "host", f"{os.cpu_count()} cores, {memory_available() / GIB:.0f} GiB of memory available"))
    return lines


if __name__ == "__main__":
    if len(sys.argv) != 3 or sys.argv[1] != "--probe":
        sys.exit(__doc__)
    print(json.dumps(probe(sys.argv[2])))
