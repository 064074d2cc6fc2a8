"""The backends that every kernel test runs on. A new one is one more name in BACKENDS.

With TRITON_INTERPRET=1 in the environment it is the Triton kernels alone, run on the CPU. That is
what test_triton_interpreted.py does, in a process of its own: Triton reads it when it is imported.
"""

import os
from collections.abc import Iterator

import pytest
import torch

from megatron_infoentropy.kernels import native

# native-<instruction set> is the native one with those vector instructions.
BACKENDS = ["reference", "native-baseline", "native-avx2", "native-avx512"]
if os.environ.get("TRITON_INTERPRET") == "1":
    import triton_interpreter

    BACKENDS = ["triton"]
    triton_interpreter.mend()


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """The name to pass as `backend`, with the instruction set chosen where it is the native one."""
    name, _, instructions = request.param.partition("-")
    if name != "native":
        yield name
        return
    reason = native.why_unavailable(torch.device("cpu"), torch.float32)
    assert reason is None, f"the tests need the C++ extension: {reason}"
    chosen = native._C.instruction_set()
    if not native._C.use_instruction_set(instructions):
        pytest.skip(f"this processor has no {instructions}")
    yield name
    native._C.use_instruction_set(chosen)


@pytest.fixture(params=["baseline", "avx2", "avx512"])
def instructions(request: pytest.FixtureRequest) -> Iterator[str]:
    """The instruction set that the native kernels use during the test."""
    chosen = native._C.instruction_set()
    if not native._C.use_instruction_set(request.param):
        pytest.skip(f"this processor has no {request.param}")
    yield request.param
    native._C.use_instruction_set(chosen)
