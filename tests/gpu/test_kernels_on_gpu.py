"""The GPU kernels through every test of kernels, each file in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.gpu
KERNELS = Path(__file__).parents[1] / "kernels"
# One launches a kernel of its own on CPU tensors; in Triton's a NaN of a logit is in the
# coefficients of its row.
LEFT_OUT = "a_softcap_is_the_tanh or nan_of_any_bits"
SUITES = ("test_backends", "test_contract", "test_promises", "test_property", "triton_cases")


@pytest.mark.parametrize("name", SUITES)
def test_the_kernel_tests_pass_on_a_gpu(name):
    options = ["-q", "-p", "no:cacheprovider", "-k", f"not ({LEFT_OUT})"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, str(KERNELS / f"{name}.py")],
        env=os.environ | {"INFOENTROPY_KERNELS_ON_GPU": "1"},
        cwd=KERNELS.parents[1],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert "passed" in done.stdout
