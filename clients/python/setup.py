"""Makes the protobuf code at build time, as the packages minitron.v1 (messages, stubs and their types)."""

import pathlib
import shutil

from setuptools import setup
from setuptools.command.build_py import build_py
from setuptools.command.sdist import sdist

HERE = pathlib.Path(__file__).resolve().parent
PACKAGE = pathlib.Path("minitron") / "v1"
NAMES = ("admin", "generation", "model")


def proto_root():
    """The protocol files: the repository's, or the copy inside a source distribution."""
    for root in (HERE.parents[1] / "proto", HERE / "proto"):
        if all((root / PACKAGE / f"{name}.proto").is_file() for name in NAMES):
            return root
    raise FileNotFoundError("minitron/v1/*.proto: neither in ../../proto nor in ./proto")


class BuildPy(build_py):
    """Adds the generated modules to what is built; an editable install has them in the source folder."""

    def _generated(self):
        folder = HERE if self.editable_mode else pathlib.Path(self.build_lib)
        for name in NAMES:
            for suffix in ("_pb2.py", "_pb2.pyi", "_pb2_grpc.py"):
                yield folder / PACKAGE / (name + suffix)
        yield folder / PACKAGE / "py.typed"

    def run(self):
        super().run()
        from grpc_tools import _proto, protoc  # a requirement of the build only

        root, out = proto_root(), HERE if self.editable_mode else pathlib.Path(self.build_lib)
        out.mkdir(parents=True, exist_ok=True)
        arguments = ["protoc", f"-I{root}", f"-I{pathlib.Path(list(_proto.__path__)[0])}", f"--python_out={out}",
                     f"--pyi_out={out}", f"--grpc_python_out={out}"]
        if protoc.main(arguments + [str(root / PACKAGE / f"{name}.proto") for name in NAMES]) != 0:
            raise RuntimeError("protoc failed; its messages are above")
        (out / PACKAGE / "py.typed").touch()

    def get_outputs(self, include_bytecode=True):
        return super().get_outputs(include_bytecode) + [str(path) for path in self._generated()]


class Sdist(sdist):
    """A source distribution has its own copy of the protocol files."""

    def make_release_tree(self, base_dir, files):
        super().make_release_tree(base_dir, files)
        target = pathlib.Path(base_dir) / "proto" / PACKAGE
        target.mkdir(parents=True, exist_ok=True)
        for name in NAMES:
            shutil.copyfile(proto_root() / PACKAGE / f"{name}.proto", target / f"{name}.proto")


setup(cmdclass={"build_py": BuildPy, "sdist": Sdist})
