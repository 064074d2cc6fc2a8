"""The backend suite and the promised bounds on the CUDA kernels, walked thread by thread on a CPU.

See `cuda_emulation` for what that cannot show; tests/gpu runs the kernels themselves.
"""

import cuda_emulation
import pytest
import test_backends
import test_promises

from megatron_infoentropy.kernels import dispatch

# Rows that begin elsewhere in their 16 bytes are summed in another order: equal, not bitwise.
LEFT_OUT = {"test_rows_may_lie_any_distance_apart"}


@pytest.fixture
def backend(monkeypatch):
    able = (cuda_emulation.KERNELS, lambda device, dtype: None)
    monkeypatch.setitem(dispatch.BACKENDS, "cuda", able)
    return "cuda"


globals().update(
    {
        name: function
        for suite in (test_backends, test_promises)
        for name, function in vars(suite).items()
        if name.startswith("test_") and name not in LEFT_OUT
    }
)
