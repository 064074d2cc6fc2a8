"""The CUDA kernels as they were compiled: what the built extension holds for every architecture.

Reads the machine code with cuobjdump, from the toolkit or from Triton's package; needs no GPU.
"""

import functools
import importlib.util
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from megatron_infoentropy.kernels import cuda, native
from megatron_infoentropy.kernels.contract import PLAIN, Shard

ARCHITECTURES = ["sm_80", "sm_90", "sm_100"]
REGISTERS = 64  # of a thread: four blocks of 256 fill a multiprocessor's 65536


def _tools() -> str | None:
    """The folder of cuobjdump and nvdisasm."""
    found = shutil.which("cuobjdump")
    if found:
        return str(Path(found).parent)
    triton = importlib.util.find_spec("triton")
    folder = (
        Path(triton.origin).parent / "backends/nvidia/bin" if triton and triton.origin else None
    )
    return str(folder) if folder and (folder / "cuobjdump").exists() else None


@pytest.fixture
def extension() -> str:
    """The path of the extension, which must hold CUDA kernels where there is a toolkit."""
    toolkit = shutil.which("nvcc") or os.environ.get("CUDA_HOME")
    if not hasattr(cuda._C, "cuda_shard_statistics"):
        if not toolkit or os.environ.get("INFOENTROPY_BUILD_CUDA") == "0":
            pytest.skip("the extension was built without CUDA")
        pytest.fail("there is a CUDA toolkit, but the extension has no CUDA kernels: make build")
    return str(cuda._C.__file__)


@functools.cache
def _dump(extension: str, *options: str) -> str:
    tools = _tools()
    if tools is None:
        pytest.skip("there is no cuobjdump, neither a toolkit's nor Triton's")
    command = [f"{tools}/cuobjdump", *options, extension]
    environment = {**os.environ, "PATH": f"{tools}:{os.environ['PATH']}"}
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, check=True
    ).stdout


def kernels_of(extension: str, architecture: str) -> dict[str, str]:
    """Machine code by kernel name."""
    parts = re.split(r"\n\s*Function : (\S+)\n", _dump(extension, "-sass", "-arch", architecture))
    return {name: code for name, code in zip(parts[1::2], parts[2::2], strict=True)}


def lines_of(code: str) -> list[tuple[str, str]]:
    """(address, instruction), in order."""
    return re.findall(r"/\*([0-9a-f]{4,})\*/\s+([^;]*);", code)


def loops_of(code: str) -> list[str]:
    """The text between each backward branch and where it goes to."""
    lines, found = lines_of(code), []
    for at, line in lines:
        to = re.search(r"\bBRA\b.*\b0x([0-9a-f]+)", line)
        if to and int(to[1], 16) < int(at, 16):
            body = [t for a, t in lines if int(to[1], 16) <= int(a, 16) <= int(at, 16)]
            found.append("\n".join(body))
    return found


def test_every_architecture_is_there_and_code_for_later_ones(extension):
    listed = _dump(extension, "-lelf")
    assert all(f".{architecture}." in listed for architecture in ARCHITECTURES)
    assert "sm_100.ptx" in _dump(extension, "-lptx")


def test_no_kernel_spills_and_four_blocks_fit_a_multiprocessor(extension):
    usage = re.findall(r"REG:(\d+) STACK:(\d+) .*?LOCAL:(\d+)", _dump(extension, "-res-usage"))
    assert len(usage) == len(ARCHITECTURES) * (3 * 3 + 3 * 2 + 2)
    assert all(int(registers) <= REGISTERS for registers, _, _ in usage)
    assert {(stack, local) for _, stack, local in usage} == {("0", "0")}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_four_loads_of_16_bytes_are_in_flight(extension, architecture):
    kernels = kernels_of(extension, architecture)
    statistics = {name: code for name, code in kernels.items() if "statistics_kernel" in name}
    gradients = {name: code for name, code in kernels.items() if "gradient_kernel" in name}
    assert (len(statistics), len(gradients)) == (9, 6)
    assert not [n for n, code in kernels.items() if re.search(r"\b(LDL|STL)\b", code)]
    for name, code in statistics.items():
        loop = max(loops_of(code), key=lambda body: len(re.findall(r"LDG\S*\.128", body)))
        before_use = loop.split("MUFU.EX2")[0]
        assert len(re.findall(r"LDG\S*\.128", before_use)) >= 4, name
    for name, code in gradients.items():
        before_use = code.split("MUFU.EX2")[0]
        assert len(re.findall(r"LDG\S*\.128", before_use)) == 4, name
        assert len(re.findall(r"STG\S*\.128", code)) == 8, name  # four of numbers, four of zeros


def test_without_a_gpu_a_launch_says_what_is_missing(extension):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    memory, target = torch.zeros(8, 8), torch.zeros(8, dtype=torch.long)
    arguments = native.arguments(memory, target, Shard(0, 8, -100), PLAIN, None)
    place = {"out": memory.data_ptr(), "out_row_stride": 8, "width": 8, "device": 0, "stream": 0}
    with pytest.raises(RuntimeError, match="choosing the GPU failed: "):
        cuda._C.cuda_shard_gradient(**arguments, **place, coefficients=memory.data_ptr())
    assert torch.equal(memory, torch.zeros(8, 8))


def test_it_says_why_it_cannot_run():
    assert cuda.why_unavailable(torch.device("cpu"), torch.float32)
    assert cuda.why_unavailable(torch.device("cuda"), torch.float64)


def test_rows_are_shared_only_where_there_are_too_few(extension):
    h200 = 132
    assert cuda.splits(1, 131072, h200) == 16
    assert cuda.splits(64, 262144, h200) == 5
    assert cuda.splits(1, 5000, h200) == 1
    assert cuda.splits(0, 131072, h200) == 16
    assert {cuda.splits(n, 131072, h200) for n in (264, 512, 1024, 4096)} == {1}
    assert cuda.splits(1, 10**6, h200) == cuda._C.CUDA_MAX_SPLITS
