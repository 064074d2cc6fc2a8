"""compute-sanitizer finds nothing in the GPU kernels, and finds what is planted."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.gpu
SCRIPT = Path(__file__).parents[1] / "kernels" / "sanitized_calls.py"
TOOLS = {
    "memcheck": "ERROR SUMMARY: 0 errors",
    "racecheck": "RACECHECK SUMMARY: 0 hazards displayed",
    "initcheck": "ERROR SUMMARY: 0 errors",
    "synccheck": "ERROR SUMMARY: 0 errors",
}


def sanitize(tool, *words):
    """(exit status, what was printed) of the calls under a tool."""
    if shutil.which("compute-sanitizer") is None:
        pytest.skip("there is no compute-sanitizer")
    command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "1"]
    done = subprocess.run(
        [*command, sys.executable, str(SCRIPT), *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=420,
    )
    return done.returncode, done.stdout


@pytest.mark.parametrize("backend", ["triton", "cuda"])
@pytest.mark.parametrize("tool", TOOLS)
def test_nothing_is_found(tool, backend):
    code, printed = sanitize(tool, "--backend", backend)
    assert code == 0, printed[-6000:]
    assert f"{backend}: every call equals float64" in printed
    assert TOOLS[tool] in printed


@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_a_planted_write_beyond_memory_is_found(backend):
    code, printed = sanitize("memcheck", "--backend", backend, "--plant")
    assert code != 0
    assert "Invalid __global__ write" in printed
