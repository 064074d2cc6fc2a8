"""Builds csrc/ as megatron_infoentropy._C; everything else is in pyproject.toml.

The extension is optional: without a compiler the package installs with the PyTorch kernels alone
and says so once when they are used. INFOENTROPY_REQUIRE_EXT=1 makes a failed build an error.
"""

import os

from pybind11.setup_helpers import Pybind11Extension
from setuptools import setup

required = os.environ.get("INFOENTROPY_REQUIRE_EXT") == "1"

setup(
    ext_modules=[
        Pybind11Extension(
            "megatron_infoentropy._C",
            ["csrc/bindings.cpp", "csrc/instruction_sets.cpp", "csrc/shard_ops_cpu.cpp"],
            depends=[
                "csrc/shard_ops.h",
                "csrc/instruction_sets.h",
                "csrc/meanings.inl",
                "csrc/shard_kernels.inl",
                "csrc/vectors.inl",
                "csrc/parallel_for.h",
            ],
            cxx_std=17,
            extra_compile_args=["-O3", "-fno-math-errno", "-pthread"],
            extra_link_args=["-pthread"],
            optional=not required,
        )
    ]
)
