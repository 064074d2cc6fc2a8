"""A Ctrl-C saves first, and a rank that has saved does not die of the signal to save."""

import os
import signal
import subprocess
import sys
import time

from megatron_infoentropy.launch.cluster import Cluster
from megatron_infoentropy.launch.scripts import Plan, hosts_script

FLAGS = (
    *("--infoentropy-objective", "focal", "--infoentropy-gamma", "1", "--infoentropy-sigma", "1"),
    *("--infoentropy-normalization", "paper", "--infoentropy-detach-weight", "--seed", "1"),
    *("--tensor-model-parallel-size", "1", "--pipeline-model-parallel-size", "1"),
)
RANK = """#!{python} -IS
import pathlib, signal, sys, time
run = pathlib.Path("{run}")

def save(number, frame):
    time.sleep(1)
    (run / "saved").touch()
    sys.exit(0)

signal.signal(signal.SIGUSR1, save)
(run / "started").touch()
time.sleep(60)
sys.exit(1)
"""
NODE = "#!/usr/bin/env bash\necho $$ > {run}/node-0.pid\nexec {rank}\n"
SSH = '#!/usr/bin/env bash\nexec setsid bash -c "${@: -1}"\n'
TORN_DOWN = """
import os, signal, sys, types
from contextlib import nullcontext

def module(name, **content):
    sys.modules[name] = types.ModuleType(name)
    vars(sys.modules[name]).update(content)

def stop(*arguments):
    signal.signal(signal.SIGUSR1, lambda number, frame: None)  # as Megatron does
    sys.exit(0)

package = "megatron_infoentropy.integration"
module("megatron.core.enums", ModelType=types.SimpleNamespace(encoder_or_decoder=1))
module("megatron.training", pretrain=stop)
module("megatron_infoentropy.runtime.cpu", install=None)
module(package + ".batch", build_datasets=None)
module(package + ".checkpoints", checkpoint_flags=lambda flags: flags,
       choose_checkpoint=lambda flags: None, keeping_checkpoints=lambda *both: nullcontext())
from megatron_infoentropy import pretrain

class Late:
    def __del__(self, kill=os.kill, me=os.getpid(), number=int(signal.SIGUSR1), write=os.write):
        write(1, b"torn down")
        kill(me, number)

late = Late()
pretrain.prepare = lambda: (None, None)
pretrain.train()
"""


def program(path, text):
    path.write_text(text)
    path.chmod(0o755)


def test_ctrl_c_at_the_terminal_saves_first(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    cluster = Cluster(1, 0, 1, hosts=("a",), address="localhost:0", python=sys.executable)
    plan = Plan(run, FLAGS, cluster, "a test")
    program(tmp_path / "rank", RANK.format(python=sys.executable, run=run))
    program(tmp_path / "ssh", SSH)
    program(run / "hosts.sh", hosts_script(plan))
    program(run / "node.sh", NODE.format(run=run, rank=tmp_path / "rank"))
    path = f"{tmp_path}:{os.environ['PATH']}"
    training = subprocess.Popen(
        ["bash", run / "hosts.sh"],
        env={**os.environ, "PATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    deadline = time.monotonic() + 60
    while not (run / "started").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    for _ in range(2):  # the terminal's, to all in the foreground; the second is impatience
        os.killpg(training.pid, signal.SIGINT)
        time.sleep(0.2)
    said, _ = training.communicate(timeout=60)
    assert training.returncode == 0, said
    assert (run / "saved").exists()


def test_a_rank_that_is_torn_down_no_longer_hears_the_order_to_save():
    done = subprocess.run([sys.executable, "-c", TORN_DOWN], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "torn down"
