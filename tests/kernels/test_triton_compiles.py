"""Every Triton kernel compiles for every GPU in use, without one, into the code that was meant.

Triton's package brings the assembler and the disassembler.
"""

import itertools
import os
import re
import subprocess
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import triton
from test_cuda_build import lines_of, loops_of
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from megatron_infoentropy.kernels.triton_device import gradient_kernel, statistics_kernel
from megatron_infoentropy.kernels.triton_kernels import LOADS, THREADS, WARPS, register_bound

LOGITS = {"bf16": 32, "fp16": 32, "fp32": 16}  # a thread and tile
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
SIZES = {"bf16": 2, "fp16": 2, "fp32": 4}
NOT_INTEGERS = {
    "scale": "fp32",
    "rate": "fp32",
    "cap_high": "fp32",
    "cap_low": "fp32",
    "target": "*i64",
}
NOT_INTEGERS |= {"statistics": "*fp32", "coefficients": "*fp32", "inverse_temperatures": "*fp32"}
DIVISIBLE = ("row_stride", "out_row_stride", "columns", "width")  # by 16, where rows are aligned


def variants(arch: int) -> Iterator[dict[str, Any]]:
    """For sm_90 every dtype, aligned or not, with and without the options; else the usual case.

    How rows are aligned and what the options do is the same code for every dtype: fp16 and fp32,
    which differ from bf16 in how a logit is unpacked and how many a thread has, get the first and
    (fp32) the last of these.
    """
    usual = arch != 90
    for kernel, dtype, aligned, options in itertools.product(
        ("statistics", "gradient"),
        ("bf16",) if usual else SIZES,
        (True,) if usual else (True, False),
        (False,) if usual else (False, True),
    ):
        is_plain, is_worst = aligned and not options, options and not aligned
        if dtype == "bf16" or is_plain or (dtype == "fp32" and is_worst):
            yield {"kernel": kernel, "dtype": dtype, "aligned": aligned, "options": options}


def compile_variant(arch: int, variant: dict[str, Any]) -> Any:
    """Triton's compiled kernel, with the specialisations of a launch with such logits."""
    aligned, dtype = variant["aligned"], variant["dtype"]
    constants = {"ALIGNED": aligned, "SOFTCAP": variant["options"], "PER_TOKEN": False}
    chosen: dict[str, Any] = {"num_warps": WARPS, "enable_fp_fusion": True}
    if variant["kernel"] == "statistics":
        kernel = statistics_kernel
        constants |= {"DISTANCE": variant["options"], "THREADS": THREADS, "LOADS": LOADS}
        constants["SQUARES"] = False
    else:
        kernel = gradient_kernel
        constants |= {"OFFSET": variant["options"], "BLOCK": THREADS * LOADS * 16 // SIZES[dtype]}
        constants |= {"TOGETHER": True, "QUADRATIC": False}
        chosen["maxnreg"] = register_bound(aligned=aligned, softcap=variant["options"])
    types = NOT_INTEGERS | {"logits": f"*{dtype}", "out": f"*{dtype}"}
    types |= dict.fromkeys(constants, "constexpr")
    signature = {name: types.get(name, "i32") for name in kernel.arg_names}
    divisible = [
        name
        for name, kind in signature.items()
        if (kind[0] == "*" and (aligned or name not in ("logits", "out")))
        or (aligned and name in DIVISIBLE)
    ]
    return triton.compile(
        ASTSource(
            kernel,
            signature,
            constexprs=constants,
            attrs={(kernel.arg_names.index(n),): [["tt.divisibility", 16]] for n in divisible},
        ),
        target=GPUTarget("cuda", arch, 32),
        options=chosen,
    )


def opcodes_of(lines: str) -> Counter[str]:
    """How often each opcode occurs in lines of machine code."""
    return Counter(re.findall(r"^(?:@!?U?P\w+ )?([A-Z][\w.]*)", lines, re.MULTILINE))


def describe(arch: int, variant: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The variant and the resources and opcodes of its machine code."""
    compiled = compile_variant(arch, variant)
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])

    usage, sass = (
        subprocess.run(
            [TOOLS / "cuobjdump", what, cubin],
            env=os.environ | {"PATH": f"{TOOLS}:{os.environ['PATH']}"},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for what in ("-res-usage", "-sass")
    )
    loops = [opcodes_of(loop) for loop in loops_of(sass)]
    return variant | {
        "arch": arch,
        "usage": {name: int(n) for name, n in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)},
        "opcodes": opcodes_of("\n".join(text for _, text in lines_of(sass))),
        "main_loop": next((loop for loop in loops if loop.total() > 3), Counter()),
    }


@pytest.mark.parametrize("arch", [90, 80, 100])
def test_machine_code_has_wide_loads_and_no_spills(arch, tmp_path, monkeypatch):
    monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path / "cache"))
    described = [describe(arch, variant, tmp_path) for variant in variants(arch)]
    assert len(described) == (14 if arch == 90 else 2)
    for variant in described:
        assert_is_what_was_meant(variant)


def assert_is_what_was_meant(variant):
    name = {key: variant[key] for key in ("arch", "kernel", "dtype", "aligned", "options")}
    opcodes, usage = variant["opcodes"], variant["usage"]
    assert usage["STACK"] == usage["LOCAL"] == 0, name
    assert not {op for op in opcodes if op.startswith(("LDL", "STL"))}, name
    # 64 registers leave 1024 threads an SM; the options may take twice as many, and both 168. On an
    # A100 Triton 3.6 takes 71, which leave 896.
    hindrances = variant["options"] + (not variant["aligned"])
    plain = 72 if variant["arch"] == 80 and triton.__version__.startswith("3.6") else 64
    assert usage["REG"] <= (plain, 128, 168)[hindrances], name
    wide_loads = sum(n for op, n in opcodes.items() if op.startswith("LDG") and "128" in op)
    wide_stores = sum(n for op, n in opcodes.items() if op.startswith("STG") and "128" in op)
    narrow = sum(n for op, n in opcodes.items() if op.startswith(("LDG", "STG")) and "U16" in op)
    if variant["kernel"] == "gradient":  # also where rows start anywhere, but for their ends
        assert wide_loads >= 4, name
        assert wide_stores >= 4, name
        assert any("EF" in op for op in opcodes), name  # not worth keeping in the caches
    if variant["aligned"]:
        assert narrow <= 1, name  # the target's own logit
    if variant["kernel"] == "statistics" and variant["aligned"]:
        assert_main_loop_is_lean(variant, name)


def assert_main_loop_is_lean(variant, name):
    loop, logits = variant["main_loop"], LOGITS[variant["dtype"]]
    assert sum(n for op, n in loop.items() if op.startswith("LDG") and "128" in op) == 4, name
    assert not {op for op in loop if op.startswith(("BAR", "SHFL", "LDS", "STS"))}, name
    if not variant["options"]:
        assert loop["MUFU.EX2"] == logits + 1, name  # one exponential a logit
        assert sum(loop.values()) <= 11 * logits, name
