"""The GPU kernels through every test of kernels, each file in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.gpu
KERNELS = Path(__file__).parents[1] / "kernels"
LEFT_OUT = "a_softcap_is_the_tanh"  # launches a kernel of its own on CPU tensors


@pytest.mark.parametrize(
    "name", ["test_backends.py", "test_promises.py", "test_property.py", "triton_cases.py"]
)
def test_the_kernel_tests_pass_on_a_gpu(name):
    options = ["-q", "-p", "no:cacheprovider", "-k", f"not {LEFT_OUT}"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, str(KERNELS / name)],
        env=os.environ | {"INFOENTROPY_KERNELS_ON_GPU": "1"},
        cwd=KERNELS.parents[1],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert "passed" in done.stdout
