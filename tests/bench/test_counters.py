"""ncu's output, in its own format: read right, or refused with what ncu says is wrong."""

import os
import sys
from dataclasses import replace

import pytest
import torch

from megatron_infoentropy.bench import counters, run
from megatron_infoentropy.bench.cases import Case
from megatron_infoentropy.bench.launch_once import launch_once
from megatron_infoentropy.bench.providers import Unavailable
from megatron_infoentropy.bench.results import row_of_case
from megatron_infoentropy.runtime.device import Device

HEADER = (
    '"ID","Process ID","Process Name","Host Name","Kernel Name","Context","Stream","Block Size",'
    '"Grid Size","Device","CC","Section Name","Metric Name","Metric Unit","Metric Value"'
)
BEFORE = """==PROF== Connected to process 4711 (/usr/bin/python3.12)
==PROF== Profiling "_statistics_kernel" - 0: 0%....50%....100% - 1 pass
"""
AFTER = "==PROF== Disconnected from process 4711\n"


def line(launch, kernel, metric, unit, value):
    return (
        f'"{launch}","4711","python3.12","127.0.0.1","{kernel}","1","7","(256, 1, 1)",'
        f'"(8192, 1, 1)","0","9.0","Command line profiler metrics","{metric}","{unit}","{value}"'
    )


def output(*lines):
    return BEFORE + "\n".join([HEADER, *lines]) + "\n" + AFTER


TWO_LAUNCHES = output(
    line(0, "_statistics_kernel", counters.READ, "byte", "2,101,346,304"),
    line(0, "_statistics_kernel", counters.WRITE, "byte", "131,072"),
    line(1, "merge<float, 4>(const float *, int)", counters.READ, "Kbyte", "524.29"),
    line(1, "merge<float, 4>(const float *, int)", counters.WRITE, "byte", "0"),
)


def test_launches_are_summed_in_bytes():
    assert counters.parse(TWO_LAUNCHES) == (2_101_346_304 + 524_290, 131_072)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (
            "==ERROR== ERR_NVGPUCTRPERM - The user does not have permission to access NVIDIA GPU "
            "Performance Counters on the target device 0.\n",
            "may not read this GPU's performance counters",
        ),
        (BEFORE + "==WARNING== No kernels were profiled.\n", "No kernels were profiled"),
        (output(line(0, "k", counters.READ, "byte", "1")), "gave no dram__bytes_write.sum"),
        (
            output(
                line(0, "k", counters.READ, "", "n/a"), line(0, "k", counters.WRITE, "byte", "1")
            ),
            "gave no dram__bytes_read.sum",
        ),
        ("", "it said nothing"),
    ],
)
def test_what_is_wrong_is_said(text, reason):
    with pytest.raises(Unavailable, match=reason):
        counters.parse(text)


@pytest.fixture
def fake_ncu(tmp_path, monkeypatch):
    """Writes an `ncu` that notes its arguments, prints the given text and exits with the code."""

    def install(text, code=0):
        (tmp_path / "text").write_text(text)
        script = tmp_path / "ncu"
        script.write_text(
            f'#!/bin/sh\nprintf "%s\\n" "$@" > {tmp_path}/arguments\n'
            f"cat {tmp_path}/text\nexit {code}\n"
        )
        script.chmod(0o755)
        return tmp_path / "arguments"

    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    return install


def test_ncu_is_asked_for_one_launch_and_leaves_the_clocks_alone(fake_ncu):
    arguments = fake_ncu(TWO_LAUNCHES)
    moved = counters.dram_bytes("triton", "statistics", Case(8192, 128256, "bfloat16"))
    assert moved.read > moved.write > 0
    words = arguments.read_text().split("\n")
    assert words[:-1] == [
        *("--csv", "--print-units", "base"),
        *("--metrics", "dram__bytes_read.sum,dram__bytes_write.sum"),
        *("--profile-from-start", "off", "--clock-control", "none"),
        *(sys.executable, "-m", "megatron_infoentropy.bench.launch_once"),
        *("triton", "statistics", "8192", "128256", "bfloat16"),
    ]


def test_a_failing_or_missing_ncu_is_a_reason(fake_ncu, monkeypatch, tmp_path):
    fake_ncu("==ERROR== ERR_NVGPUCTRPERM - no permission\n", code=1)
    with pytest.raises(Unavailable, match="ERR_NVGPUCTRPERM"):
        counters.dram_bytes("triton", "gradient", Case(8, 64))
    monkeypatch.setenv("PATH", str(tmp_path / "nowhere"))
    with pytest.raises(Unavailable, match="is not installed"):
        counters.dram_bytes("triton", "gradient", Case(8, 64))


@pytest.mark.parametrize("step", ["statistics", "gradient", "gradient in place"])
def test_what_ncu_runs_launches_on_any_device(step):
    launch_once("reference", step, 8, 64, torch.bfloat16)


def test_counted_bytes_join_the_kernels_of_the_first_case(fake_ncu):
    fake_ncu(TWO_LAUNCHES)
    first, other = Case(8, 64), Case(16, 64)
    new = {"kind": "kernel", "by": "ours", "computes": "", "threads": 1, "clock": "CUDA events"}
    names = [("triton", "statistics"), ("triton", "gradient"), ("reference", "statistics")]
    rows = [row_of_case(first, provider=name, step=step, **new) for name, step in names]
    rows.append(row_of_case(other, provider="triton", step="statistics", **new))
    counted = run._with_dram_bytes(rows, Device("cuda", "nccl", 1))
    assert [row.dram_write_bytes for row in counted] == [131_072, 131_072, None, None]
    assert [replace(row, dram_read_bytes=None, dram_write_bytes=None) for row in counted] == rows


def test_without_a_gpu_the_reason_stands_in_the_rows():
    row = row_of_case(Case(8, 64), kind="kernel", provider="native", step="statistics", by="ours",
                      computes="", threads=1, clock="wall time")  # fmt: skip
    *same, left_out = run._with_dram_bytes([row], Device("cpu", "gloo", 1))
    assert same == [row]
    assert "no GPU" in left_out.reason
