"""The Triton kernels through every kernel test, on a CPU, by Triton's interpreter."""

import os
import subprocess
import sys
from pathlib import Path

import torch

from megatron_infoentropy.kernels import dispatch, triton_kernels

HERE = Path(__file__).parent
SUITES = ("test_backends", "test_contract", "test_promises", "test_property", "triton_cases")
# Left to triton_cases.py, by fewer rows: the interpreter takes milliseconds a row. Of the last, a
# NaN of a logit is in the coefficients of its row.
LEFT_OUT = (
    "large_gradients or number_of_threads or every_vocabulary or entropy_term"
    " or whatever_the_upstream or capped_logit or every_float16 or nearest_even or nan_of_any_bits"
)


def test_the_kernel_tests_pass_in_the_interpreter():
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", f"not ({LEFT_OUT})"]
        + [str(HERE / f"{name}.py") for name in SUITES],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        cwd=HERE.parents[1],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert "passed" in done.stdout
    assert "skipped" not in done.stdout


def test_reasons_say_what_is_missing(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    cpu, gpu = torch.device("cpu"), torch.device("cuda:0")
    assert "logits are on cpu" in triton_kernels.why_unavailable(cpu, torch.float32)
    assert "not float64" in triton_kernels.why_unavailable(gpu, torch.float64)
    assert triton_kernels.why_unavailable(gpu, torch.bfloat16) is None
    with monkeypatch.context() as other_gpu:
        other_gpu.setattr(torch.cuda, "is_available", lambda: True)
        other_gpu.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
        assert "capability 8.0" in triton_kernels.why_unavailable(gpu, torch.bfloat16)
        other_gpu.setattr(torch.version, "hip", "6.4")
        assert "NVIDIA GPUs" in triton_kernels.why_unavailable(gpu, torch.bfloat16)
    monkeypatch.setattr(triton_kernels.importlib.util, "find_spec", lambda name: None)
    assert "not installed" in triton_kernels.why_unavailable(gpu, torch.bfloat16)


def test_the_name_chooses_these_kernels():
    assert dispatch.by_name("triton") is triton_kernels.KERNELS
