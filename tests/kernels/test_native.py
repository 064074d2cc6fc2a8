"""What only the native kernels have: instruction sets, and threads, as many as torch says."""

import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_infoentropy.kernels import native
from megatron_infoentropy.kernels.contract import PLAIN, Shard


def test_every_instruction_set_of_this_architecture_runs_here():
    known = ["avx512", "avx2", "baseline"] if platform.machine() == "x86_64" else ["baseline"]
    here = native._C.instruction_sets()
    assert here == [name for name in known if name in here]
    if here != known:
        pytest.skip(f"this processor lacks {', '.join(set(known) - set(here))}: not run")


def test_as_many_threads_as_torch_says(monkeypatch):
    """One a rank under torchrun, which says so to torch."""
    given, compiled = [], native._C

    class Spy:
        def shard_statistics(self, **arguments):
            given.append(arguments["threads"])
            compiled.shard_statistics(**arguments)

    monkeypatch.setattr(native, "_C", Spy())
    before = torch.get_num_threads()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            logits, target = torch.randn(2, 10), torch.zeros(2, dtype=torch.long)
            native.shard_statistics(logits, target, Shard(0, 10, -100), PLAIN)
    finally:
        torch.set_num_threads(before)
    assert given == [1, 3]


SHARED_AND_FORKED = """
import os, sys, threading
import torch
from megatron_infoentropy.kernels import native
from megatron_infoentropy.kernels.contract import PLAIN, Shard
torch.set_num_threads(2)
logits, target = torch.ones(256, 20000), torch.zeros(256, dtype=torch.long)
logits.amax(-1)  # torch starts its threads
seen, done = [], threading.Event()
def watch():
    while not done.is_set():
        seen.append(len(os.listdir("/proc/self/task")))
watcher = threading.Thread(target=watch)
watcher.start()
before = len(os.listdir("/proc/self/task"))
for _ in range(40):
    native.shard_statistics(logits, target, Shard(0, 20000, -100), PLAIN)
done.set()
watcher.join()
sys.stdout.write(f"{before} threads before, {max(seen)} at most")
def run():
    return float(native.shard_statistics(logits, target, Shard(0, 20000, -100), PLAIN)[1, 0])
parent = run()
child = os.fork()  # in which torch's own threads do not live
if child == 0:
    os._exit(0 if run() == parent else 3)
sys.exit(max(seen) > before or os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="threads are counted on Linux")
def test_the_threads_are_those_that_torch_has_and_a_forked_child_needs_none_of_them():
    """Others would share the cores with torch's, which spin on after each of its operations."""
    done = subprocess.run(
        [sys.executable, "-c", SHARED_AND_FORKED],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
