"""The backends that every kernel test runs on. A new one is one more name in BACKENDS.

With TRITON_INTERPRET=1 in the environment it is the Triton kernels alone, run on the CPU. That is
what test_triton_interpreted.py does, in a process of its own: Triton reads it when it is imported.
With INFOENTROPY_KERNELS_ON_GPU=1 it is the GPU kernels, as tests/gpu/test_kernels_on_gpu.py does.
"""

import contextlib
import os
from collections.abc import Iterator

import pytest
import torch

from megatron_infoentropy.kernels import native

# Those this processor has; test_native_options.py says which it lacks.
INSTRUCTION_SETS = native._C.instruction_sets() if native._C else ["not built"]
# native-<instruction set> is the native one with those vector instructions.
BACKENDS = ["reference", *(f"native-{name}" for name in INSTRUCTION_SETS)]
if os.environ.get("TRITON_INTERPRET") == "1":
    import triton_interpreter

    BACKENDS = ["triton"]
    triton_interpreter.mend()
if os.environ.get("INFOENTROPY_KERNELS_ON_GPU") == "1":
    import on_gpu

    BACKENDS = on_gpu.install()


@contextlib.contextmanager
def using(instructions: str) -> Iterator[None]:
    """The native kernels with those vector instructions."""
    reason = native.why_unavailable(torch.device("cpu"), torch.float32)
    assert reason is None, f"the tests need the C++ extension: {reason}"
    chosen = native._C.instruction_set()
    assert native._C.use_instruction_set(instructions)
    yield
    native._C.use_instruction_set(chosen)


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """The name to pass as `backend`, with the instruction set chosen where it is the native one."""
    name, _, instructions = request.param.partition("-")
    if name != "native":
        yield name
        return
    with using(instructions):
        yield name


@pytest.fixture(params=INSTRUCTION_SETS)
def instructions(request: pytest.FixtureRequest) -> Iterator[str]:
    """The instruction set that the native kernels use during the test."""
    with using(request.param):
        yield request.param
