"""The two sides of a comparison: their programs, the same model for both, and how they are run."""
import dataclasses
import pathlib
import subprocess
import sys
from collections.abc import Sequence

import results

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parents[2]
QUANTIZE = {"bf16": "none", "int8": "int8", "int4": "int4"}
SHAPE = "1b-square"  # stock llama.cpp takes no other head count at this width


@dataclasses.dataclass(frozen=True)
class Sides:
    """Where everything is."""

    # Absolute paths.
    ours: pathlib.Path  # folder of minitron-bench-engine and the others
    peer: pathlib.Path  # folder of llama-batched-bench and the others
    work: pathlib.Path  # models are made here once and kept
    architecture: str  # of the peer's file
    target: str  # instruction set of ours; empty: the best
    cores: str  # both sides run on these, as taskset lists them
    threads: int

    def checkpoint(self) -> pathlib.Path:
        return self.work / SHAPE

    def gguf(self, weight_format: str) -> pathlib.Path:
        return self.work / f"{SHAPE}-{self.architecture}-{results.FORMATS[weight_format]}.gguf"

    def run(self, command: Sequence[str | pathlib.Path], with_log: bool = False) -> str:
        """Runs pinned, in `work`: some peers write logs where they are. A failure ends the comparison in its words."""
        return run(["taskset", "-c", self.cores, *command], with_log, self.work)

    def engine(self, *arguments: str | pathlib.Path) -> str:
        target = ["--target", self.target] if self.target else []
        return self.run([self.ours / "minitron-bench-engine", "--threads", str(self.threads), *target, *arguments])

    def probe(self) -> results.Limits:
        return results.parse_limits(self.engine())


def absolute(path: str) -> pathlib.Path:
    return pathlib.Path(path).resolve()


def run(command: Sequence[str | pathlib.Path], with_log: bool = False, folder: pathlib.Path | None = None) -> str:
    """What the program printed on standard output, and `with_log` on standard error. It works in `folder`."""
    words = [str(word) for word in command]
    done = subprocess.run(words, capture_output=True, text=True, check=False, cwd=folder)
    if done.returncode != 0:
        sys.exit(f"{' '.join(words)}\nended with {done.returncode}:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return done.stdout + (done.stderr if with_log else "")


def add_tokenizer(checkpoint: pathlib.Path) -> None:
    """The shipped model's, so that the server starts; tokens beyond its pieces are sent as ids without text."""
    tokenizer = checkpoint / "tokenizer.model"
    if not tokenizer.exists():
        tokenizer.write_bytes((ROOT / "deploy/models/minitron-tiny/tokenizer.model").read_bytes())


def prepare(sides: Sides, formats: Sequence[str]) -> None:
    """Makes the checkpoint and the peer's files that are not there yet."""
    checkpoint = sides.checkpoint()
    if not (checkpoint / "model.safetensors").exists():
        checkpoint.mkdir(parents=True, exist_ok=True)
        run([sides.ours / "minitron-make-checkpoint", SHAPE, checkpoint])
    (sides.work / "cache").mkdir(exist_ok=True)
    source = sides.gguf("bf16")
    if not source.exists():
        python = ROOT / "build/venv-peers/bin/python"
        run([python, HERE / "make_gguf.py", "--architecture", sides.architecture, checkpoint, source])
    for weight_format in formats:
        target = sides.gguf(weight_format)
        if not target.exists():
            partial = target.with_suffix(".partial")
            run([sides.peer / "llama-quantize", source, partial, results.FORMATS[weight_format], str(sides.threads)])
            partial.rename(target)
