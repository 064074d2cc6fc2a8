"""Megatron on the CPU: redirected where there is no GPU, untouched where there is one; the device.

Each test that installs the redirections runs in a process of its own, since Megatron must not be
imported before them.
"""

import os
import subprocess
import sys
from pathlib import Path
from pkgutil import resolve_name

import pytest
import torch

from megatron_infoentropy.runtime import cpu
from megatron_infoentropy.runtime.device import CPU_ENVIRONMENT, Device, find_device

HERE = Path(__file__).parent
ONE_RANK = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
ONE_RANK |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}


def run_python(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the interpreter on the arguments, from the repository root; fail with its output."""
    paths = [str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), **ONE_RANK},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done


def current(symbol: str) -> object:
    owner, _, name = symbol.rpartition(".")
    return getattr(resolve_name(owner), name)


def torch_symbols() -> dict[str, object]:
    names = [symbol for symbol, _ in cpu.redirections() if symbol.startswith("torch.")]
    return {name: current(name) for name in names}


without_a_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


CHECK_LARGE_TENSORS = """
import contextlib, sys
from megatron_infoentropy import cli
from megatron_infoentropy.runtime import cpu
if sys.argv[1:] == ["--version"]:
    with contextlib.suppress(SystemExit):
        cli.main()
else:
    cpu.install()
import torch
large, mapping = torch.ones(1 << 22), ()
place = large.data_ptr()
with open("/proc/self/smaps") as file:
    for words in map(str.split, file):
        if not words[0].endswith(":"):
            first, last = (int(end, 16) for end in words[0].split("-"))
        elif words[0] == "VmFlags:" and first <= place < last:
            assert "hg" in words, words
            mapping = words
assert mapping
"""


@pytest.mark.skipif(
    not Path("/sys/kernel/mm/transparent_hugepage").is_dir(), reason="no such pages"
)
@pytest.mark.parametrize(
    ("start", "environment"),
    [("--version", {}), ("training", CPU_ENVIRONMENT)],
    ids=["a command", "a rank"],
)
def test_large_tensors_ask_for_huge_pages(
    start: str, environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if start == "training" and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    run_python("-c", CHECK_LARGE_TENSORS, start)


COUNT_FAULTS = """
from resource import RUSAGE_SELF, getrusage
from megatron_infoentropy.runtime.device import use_huge_pages
use_huge_pages()
import torch
before = getrusage(RUSAGE_SELF).ru_minflt
for _ in range(12):
    torch.ones(1 << 24)
print(getrusage(RUSAGE_SELF).ru_minflt - before)
"""


def test_a_rank_fetches_memory_less_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    elsewhere = int(run_python("-c", COUNT_FAULTS).stdout)
    for name, value in CPU_ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    assert int(run_python("-c", COUNT_FAULTS).stdout) < elsewhere / 2


CHECK_EVERY_SYMBOL = """
import logging, torch
logging.basicConfig()
from megatron_infoentropy.runtime import cpu
from tests.runtime.test_cpu import current, torch_symbols
before = torch_symbols()
cpu.install()
for redirection in cpu._REDIRECTIONS:
    assert current(redirection.symbol) is redirection.replacement, redirection.symbol
    assert current(redirection.symbol) is not before.get(redirection.symbol), redirection.symbol
mode_depth = torch._C._len_torch_function_stack()
cpu.install()
assert torch._C._len_torch_function_stack() == mode_depth == 1
assert torch.zeros(1, device="cuda").to("cuda:0").cuda().device.type == "cpu"
assert torch.zeros(1).type() == "torch.cuda.FloatTensor"
assert not torch.zeros(1, device="cuda").is_cuda
cpu.uninstall()
assert torch_symbols() == before and torch._C._len_torch_function_stack() == 0
assert torch.zeros(1).type() == "torch.FloatTensor" and not torch.cuda.is_available()
cpu.uninstall()
"""


@without_a_gpu
def test_every_listed_symbol_is_redirected_once_said_once_and_restored() -> None:
    done = run_python("-c", CHECK_EVERY_SYMBOL)
    assert done.stderr.count("Megatron runs on the CPU") == 1


def test_nothing_is_touched_where_there_is_a_gpu(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    before, environment = torch_symbols(), dict(os.environ)
    depth = torch._C._len_torch_function_stack()
    cpu.install()
    assert not cpu.is_installed()
    assert torch_symbols() == before
    assert torch._C._len_torch_function_stack() == depth
    assert dict(os.environ) == environment
    assert not caplog.records


def test_a_missing_symbol_is_named_and_leaves_nothing_half_redirected(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    gone = cpu._Redirection("torch.cuda.no_such_function", None, "")
    monkeypatch.setattr(cpu, "_REDIRECTIONS", (*cpu._REDIRECTIONS[:5], gone))
    before = {r.symbol: current(r.symbol) for r in cpu._REDIRECTIONS[:5]}
    with pytest.raises(AttributeError, match="no_such_function"):
        cpu.install()
    assert not cpu.is_installed()
    assert {symbol: current(symbol) for symbol in before} == before


def test_every_symbol_is_listed_once_with_a_reason() -> None:
    reasons = dict(cpu.redirections())
    assert len(reasons) == len(cpu.redirections())
    assert all(reasons.values())


@pytest.mark.parametrize(
    ("has_gpu", "is_redirected", "device"),
    [
        (True, False, Device("cuda", "nccl", 3)),
        (False, False, Device("cpu", "gloo", 1)),
        (True, True, Device("cpu", "gloo", 1)),  # as the redirections claim
    ],
)
def test_the_device_is_that_of_the_machine(
    monkeypatch: pytest.MonkeyPatch, has_gpu: bool, is_redirected: bool, device: Device
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(cpu, "is_installed", lambda: is_redirected)
    assert find_device() == device
