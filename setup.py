"""Builds csrc/ as megatron_infoentropy._C; everything else is in pyproject.toml.

The extension is optional: without a compiler the package installs with the PyTorch kernels alone
and says so once when they are used. INFOENTROPY_REQUIRE_EXT=1 makes a failed build an error.

Where a CUDA toolkit is (nvcc on the PATH or under CUDA_HOME; a GPU is not needed) the extension
holds the CUDA kernels too. INFOENTROPY_BUILD_CUDA=0 leaves them out, =1 says so when there is no
toolkit; INFOENTROPY_REQUIRE_CUDA=1 makes an extension without them an error.
"""

import copy
import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

from pybind11.setup_helpers import Pybind11Extension, build_ext
from setuptools import Extension, setup
from setuptools.errors import CCompilerError
from setuptools.modified import newer_group

ARCHITECTURES = ("80", "90", "100")  # those nvcc knows; the newest also as PTX, for later GPUs
KERNELS = "csrc/shard_ops_cuda.cu"
CUDA_HEADERS = [
    *("csrc/shard_ops_cuda.h", "csrc/cuda_arithmetic.h"),
    *("csrc/cuda_statistics.h", "csrc/cuda_gradient.h"),
]
HAS_CUDA = b"cuda_shard_statistics"  # a name only an extension with CUDA kernels contains

require_cuda = os.environ.get("INFOENTROPY_REQUIRE_CUDA") == "1"
required = os.environ.get("INFOENTROPY_REQUIRE_EXT") == "1" or require_cuda


def find_nvcc() -> str | None:
    """The CUDA compiler to use, or None."""
    build = os.environ.get("INFOENTROPY_BUILD_CUDA")
    home = os.environ.get("CUDA_HOME")
    found = shutil.which("nvcc", path=f"{home}/bin") if home else None
    nvcc = None if build == "0" else found or shutil.which("nvcc")
    if nvcc is None and (require_cuda or build == "1"):
        reason = "INFOENTROPY_BUILD_CUDA is 0" if build == "0" else "there is no nvcc"
        raise CCompilerError(f"{reason}: put nvcc on the PATH, or set CUDA_HOME")
    return nvcc


def run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False, errors="replace")
    if done.returncode != 0:
        raise CCompilerError(f"{' '.join(command)} failed:\n{done.stdout}{done.stderr}")
    return done.stdout + done.stderr


def compile_kernels(nvcc: str, folder: Path) -> Path:
    """One object file with code for every architecture."""
    known = run([nvcc, "--list-gpu-code"]).split()
    targets = [a for a in ARCHITECTURES if f"sm_{a}" in known]
    if not targets:
        wanted = ", ".join(f"sm_{a}" for a in ARCHITECTURES)
        raise CCompilerError(
            f"{nvcc} knows none of {wanted}: put a CUDA toolkit from 11.0 on the PATH"
        )
    codes = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in targets]
    codes.append(f"-gencode=arch=compute_{targets[-1]},code=compute_{targets[-1]}")
    words = [w for w in shlex.split(os.environ.get("CXX", "")) if not w.startswith("-")]
    compiler = [f"-ccbin={words[-1]}"] if words else []  # the last: "ccache g++"
    folder.mkdir(parents=True, exist_ok=True)
    result = folder / "shard_ops_cuda.o"
    options = ["-std=c++17", "-O3", "-Xcompiler=-fPIC,-fvisibility=hidden", "--threads=0"]
    run([nvcc, *options, *codes, *compiler, "-c", KERNELS, "-o", str(result)])
    return result


def with_cuda(extension: Extension, nvcc: str, folder: Path) -> Extension:
    """The extension with the CUDA kernels and a runtime of their own, so that it also loads where
    there is no driver."""
    listing = run([nvcc, "--dryrun", "-c", KERNELS, "-o", os.devnull])
    libraries = re.search(r"^#\$ LIBRARIES=(.*)$", listing, re.MULTILINE)
    if libraries is None:
        raise CCompilerError(
            f"{nvcc} --dryrun names no LIBRARIES: set CUDA_HOME to a whole toolkit"
        )
    result = copy.copy(extension)
    result.sources = [*extension.sources, "csrc/bindings_cuda.cpp"]
    result.define_macros = [*extension.define_macros, ("INFOENTROPY_CUDA", "1")]
    result.extra_objects = [str(compile_kernels(nvcc, folder))]
    result.library_dirs = re.findall(r'-L([^"\s]+)', libraries[1])
    result.libraries = ["cudart_static", "rt", "dl"]
    return result


class Build(build_ext):
    """Builds with CUDA kernels where it can, else says in a line why not and builds without."""

    def build_extension(self, ext: Extension) -> None:
        built = Path(self.get_ext_fullpath(ext.name))
        try:
            nvcc = find_nvcc()
            stale = newer_group([*ext.sources, *ext.depends], str(built)) or self.force
            if nvcc and (stale or HAS_CUDA not in built.read_bytes()):
                self.force = True
                super().build_extension(with_cuda(ext, nvcc, Path(self.build_temp)))
                return
        except CCompilerError as error:
            if require_cuda:
                raise
            self.warn(f"the extension is built without CUDA kernels: {str(error).splitlines()[-1]}")
        if os.environ.get("INFOENTROPY_BUILD_CUDA") == "0" and built.exists():
            self.force = self.force or HAS_CUDA in built.read_bytes()
        super().build_extension(ext)


setup(
    cmdclass={"build_ext": Build},
    ext_modules=[
        Pybind11Extension(
            "megatron_infoentropy._C",
            [
                *("csrc/bindings.cpp", "csrc/instruction_sets.cpp"),
                *("csrc/shard_ops_cpu.cpp", "csrc/threads.cpp"),
            ],
            depends=[
                "csrc/bindings.h",
                "csrc/shard_ops.h",
                "csrc/instruction_sets.h",
                "csrc/meanings.inl",
                "csrc/shard_kernels.inl",
                "csrc/vectors.inl",
                "csrc/parallel_for.h",
                *(KERNELS, "csrc/bindings_cuda.cpp", *CUDA_HEADERS),
            ],
            cxx_std=17,
            extra_compile_args=["-O3", "-fno-math-errno", "-pthread"],
            extra_link_args=["-pthread"],
            optional=not required,
        )
    ],
)
