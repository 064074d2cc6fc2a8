"""The C++ kernels on other compilers and processors: against double precision, and as assembly.

self_test.cpp runs every instruction set that the processor has. For aarch64 it is cross-compiled
and emulated. What no processor here has is looked at as assembly.
"""

import os
import platform
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FLAGS = ["-std=c++17", "-O3", "-fno-math-errno", "-Wall", "-Wextra", "-Werror", "-pthread"]
TOOLS = {  # compiler: what runs its programs
    "g++": [],
    "clang++": [],
    "aarch64-linux-gnu-g++": ["qemu-aarch64"],
}
ON_X86 = platform.machine() == "x86_64"


def run(*command: object) -> str:
    done = subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def objects(tmp_path_factory):
    """compiler -> its object file of all instruction sets, compiled when first asked for."""
    built = {}

    def compiled_by(compiler: str) -> Path:
        if shutil.which(compiler) is None:
            pytest.skip(f"there is no {compiler}")
        if compiler not in built:
            built[compiler] = tmp_path_factory.mktemp(compiler) / "instruction_sets.o"
            source = ROOT / "csrc/instruction_sets.cpp"
            run(compiler, *FLAGS, "-c", source, "-o", built[compiler])
        return built[compiler]

    return compiled_by


@pytest.mark.parametrize("compiler", TOOLS)
def test_every_instruction_set_agrees_with_double_precision(compiler, objects, tmp_path):
    emulator = TOOLS[compiler]
    if emulator and shutil.which(emulator[0]) is None:
        pytest.skip(f"there is no {emulator[0]}")
    program = tmp_path / "self_test"
    names = ("tests/kernels/self_test.cpp", "csrc/shard_ops_cpu.cpp", "csrc/threads.cpp")
    sources = [ROOT / name for name in names]
    static = ["-static"] if emulator else []
    run(compiler, *FLAGS, *static, *sources, objects(compiler), "-o", program)
    said = run(*emulator, program)
    assert "tested baseline" in said


def test_a_compiler_is_there_to_test_with():
    assert os.environ.get("CXX") or any(map(shutil.which, TOOLS)), "no C++ compiler was found"


def loops_of(listing: str, function: str) -> list[str]:
    """The bodies between a backward jump and where it goes, of every function of that name."""
    loops = []
    for part in re.split(r"\n(?=[0-9a-f]{8,} <)", listing):
        if function not in part.partition("\n")[0]:
            continue
        lines = re.findall(r"^ *([0-9a-f]+):\s+(.*)$", part, re.MULTILINE)
        places = {int(address, 16): i for i, (address, _) in enumerate(lines)}
        for i, (_, text) in enumerate(lines):
            jump = re.match(r"j\w+\s+([0-9a-f]+) ", text)
            start = places.get(int(jump[1], 16)) if jump else None
            if start is not None and start < i:
                loops.append("\n".join(line for _, line in lines[start : i + 1]))
    return loops


@pytest.mark.skipif(not ON_X86, reason="x86-64 only")
@pytest.mark.parametrize(("instructions", "register"), [("avx2", "ymm"), ("avx512", "zmm")])
@pytest.mark.parametrize("kernel", ["row_statistics", "row_gradient"])
@pytest.mark.parametrize("dtype", ["float", "BFloat16", "Float16"])
def test_the_inner_loops_use_whole_registers_and_call_nothing(
    objects, instructions, register, kernel, dtype
):
    listing = run("objdump", "-dC", "--no-show-raw-insn", objects("g++"))
    listing = listing.replace("infoentropy::(anonymous namespace)::", "")
    name = f"{instructions}::{kernel}<{dtype}, {instructions}::Plain>"
    loops = [loop for loop in loops_of(listing, name) if loop.count("vfmadd") >= 8]
    innermost = [a for a in loops if not any(a is not b and b in a for b in loops)]
    assert innermost, f"no loop of {name} holds the polynomial"
    for loop in innermost:
        assert "call" not in loop
        products = re.findall(r"vfn?madd\d+ps .*", loop)
        assert all(f"%{register}" in line for line in products), "a narrower register in the loop"
        rare = "vcmpeqps" in loop  # of the chunks that hold the row's maximum
        spilled = re.search(r"mm\d+,\S*\(%r[sb]p\)", loop)
        assert rare or not spilled, "a register is spilled in the loop"
