"""Every Triton kernel compiles for every GPU in use, without one, into the code that was meant."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
LOGITS = {"bf16": 32, "fp16": 32, "fp32": 16}  # a thread and tile


@pytest.mark.parametrize("arch", [90, 80, 100])
def test_machine_code_has_wide_loads_and_no_spills(arch, tmp_path):
    environment = {k: v for k, v in os.environ.items() if not k.startswith("TRITON")}
    done = subprocess.run(
        [sys.executable, str(HERE / "triton_compile.py"), str(arch), str(tmp_path)],
        env=environment | {"TRITON_CACHE_DIR": str(tmp_path / "cache"), "PYTHONPATH": "."},
        cwd=HERE.parents[1],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    variants = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(variants) == (14 if arch == 90 else 2)
    for variant in variants:
        assert_is_what_was_meant(variant)


def assert_is_what_was_meant(variant):
    name = {key: variant[key] for key in ("arch", "kernel", "dtype", "aligned", "options")}
    opcodes, usage = variant["opcodes"], variant["usage"]
    assert usage["STACK"] == usage["LOCAL"] == 0, name
    assert not {op for op in opcodes if op.startswith(("LDL", "STL"))}, name
    # 64 registers leave 1024 threads an SM; the options may take twice as many, and both 168.
    hindrances = variant["options"] + (not variant["aligned"])
    assert usage["REG"] <= (64, 128, 168)[hindrances], name
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
