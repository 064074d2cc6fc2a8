"""The backends that every kernel test runs on. A new one is one more name in BACKENDS.

With TRITON_INTERPRET=1 in the environment it is the Triton kernels alone, run on the CPU. That is
what test_triton_interpreted.py does, in a process of its own: Triton reads it when it is imported.
With INFOENTROPY_KERNELS_ON_GPU=1 it is the GPU kernels, as tests/gpu/test_kernels_on_gpu.py does.
"""

import os
from collections.abc import Iterator

import cuda_emulation
import pytest
import torch

from megatron_infoentropy.kernels import dispatch, native
from megatron_infoentropy.kernels.contract import Kernels

# Those this processor has; test_native.py says which it lacks.
INSTRUCTION_SETS = native._C.instruction_sets() if native._C else ["not built"]
# native-<instruction set> is the native one with those vector instructions, cuda-walked the CUDA
# kernels thread by thread on the CPU.
BACKENDS = ["reference", *(f"native-{name}" for name in INSTRUCTION_SETS), "cuda-walked"]
if os.environ.get("TRITON_INTERPRET") == "1":
    import triton_interpreter

    BACKENDS = ["triton"]
    triton_interpreter.mend()
if os.environ.get("INFOENTROPY_KERNELS_ON_GPU") == "1":
    import on_gpu

    BACKENDS = on_gpu.install()


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The name to pass as `backend`, with the kernels that it stands for here."""
    name, _, kind = request.param.partition("-")
    if name == "native":
        reason = native.why_unavailable(torch.device("cpu"), torch.float32)
        assert reason is None, f"the tests need the C++ extension: {reason}"
        chosen = native._C.instruction_set()
        assert native._C.use_instruction_set(kind)
        yield name
        native._C.use_instruction_set(chosen)
        return
    if kind == "walked":
        able = (cuda_emulation.KERNELS, lambda device, dtype: None)
        monkeypatch.setitem(dispatch.BACKENDS, name, able)
    yield name


@pytest.fixture
def kernels(backend: str) -> Kernels:
    """The two functions of a backend."""
    return dispatch.by_name(backend)
