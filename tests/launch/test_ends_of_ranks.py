"""What a rank, and what it has spawned, makes of an order to save that comes late."""

import signal
import subprocess
import sys

TORN_DOWN = """
import os, signal, sys, types
from contextlib import nullcontext

def module(name, **content):
    sys.modules[name] = types.ModuleType(name)
    vars(sys.modules[name]).update(content)

def fail():
    raise ValueError

package = "megatron_infoentropy.integration"
module("megatron_infoentropy.runtime.cpu", install=None)
module(package + ".checkpoints", checkpoint_flags=lambda flags: flags,
       choose_checkpoint=lambda flags: None, warn=lambda *both: None,
       writing_manifests=lambda *both: nullcontext())
module(package, checkpoints=sys.modules[package + ".checkpoints"])  # no torch, no Megatron
from megatron_infoentropy import pretrain

class Late:
    def __del__(self, kill=os.kill, me=os.getpid, number=int(signal.SIGTERM), write=os.write):
        write(1, b"torn down\\n")
        kill(me(), number)

def rank(end):
    def run(*arguments):
        signal.signal(signal.SIGTERM, lambda number, frame: None)  # as Megatron does
        end()
    container = types.SimpleNamespace(model=types.SimpleNamespace(pre_wrap_hooks=[]))
    pretrain.prepare, pretrain.run = lambda: (container, None), run
    sys.late = Late()
    pretrain.train()

for end in (sys.exit, int, fail):
    if (pid := os.fork()) == 0:
        rank(end)
        sys.exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


def test_a_rank_that_is_torn_down_no_longer_hears_the_order_to_save():
    """One that has failed does: torchrun ends it before it starts all anew."""
    done = subprocess.run([sys.executable, "-c", TORN_DOWN], capture_output=True, text=True)
    ends = ["torn down", "0", "torn down", "0", "torn down", str(-signal.SIGTERM)]
    assert done.stdout.split("\n")[:-1] == ends, done.stderr


def test_a_process_that_a_rank_has_spawned_outlives_the_order_to_save():
    """Megatron's queue of a checkpoint's writers; Slurm sends SIGTERM to every process."""
    code = (
        "import runpy, signal, sys, types; "
        "sys.modules['megatron_infoentropy.runtime.cpu'] = types.ModuleType('cpu'); "
        "runpy.run_module('megatron_infoentropy.pretrain', None, "
        "'__mp_main__'); signal.raise_signal(signal.SIGTERM); print('alive')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "alive\n", done.stderr
