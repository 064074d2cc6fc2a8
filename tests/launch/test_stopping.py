"""A Ctrl-C saves first, and a rank that has saved does not die of the signal to save."""

import os
import pty
import signal
import subprocess
import sys
import time

import pytest

from megatron_infoentropy.launch.cluster import Address, Cluster
from megatron_infoentropy.launch.scripts import Plan, hosts_script, node_script

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
NODE = "#!/usr/bin/env bash\necho $$ > {run}/node-0.pid\nexec {rank} node.sh\n"
# It takes its time to connect.
SSH = """#!/usr/bin/env bash
case "${{@: -1}}" in NODE=*) touch {run}/connecting; sleep 2;; esac
exec bash -c "${{@: -1}}"
"""
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
       choose_checkpoint=lambda flags: None, writing_manifests=lambda *both: nullcontext())
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


# As torchrun: hears SIGINT whatever it inherits, and dies of it.
TORCHRUN = """#!{python} -IS
import signal, subprocess, sys
rank = subprocess.Popen(["{rank}"])
signal.signal(signal.SIGINT, signal.SIG_DFL)
sys.exit(rank.wait())
"""


def interrupted(script, run, at, **environment):
    """Start a script, press Ctrl-C twice once the file `at` is there; (exit code, what it said)."""
    training = subprocess.Popen(
        ["bash", run / script],
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        # Who starts the tests in the background of a script has SIGINT ignored, for bash for ever.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 300
    while not (run / at).exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    for _ in range(2):  # the terminal's, to all in the foreground; the second is impatience
        os.killpg(training.pid, signal.SIGINT)
        time.sleep(0.2)
    said, _ = training.communicate(timeout=300)
    return training.returncode, said


@pytest.fixture
def run(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    program(tmp_path / "rank", RANK.format(python=sys.executable, run=run))
    return run


@pytest.mark.parametrize("at", ["connecting", "started"])
def test_ctrl_c_to_all_hosts_saves_first(run, tmp_path, at):
    cluster = Cluster(1, 0, 1, hosts=(Address("a"),), python=sys.executable)
    program(tmp_path / "ssh", SSH.format(run=run))
    program(run / "hosts.sh", hosts_script(Plan(run, FLAGS, cluster, "a test")))
    program(run / "node.sh", NODE.format(run=run, rank=tmp_path / "rank"))
    code, said = interrupted("hosts.sh", run, at, PATH=f"{tmp_path}:{os.environ['PATH']}")
    assert code == 0, said
    assert (run / "saved").exists()


def test_ctrl_c_to_one_node_saves_first(run, tmp_path):
    program(tmp_path / "torchrun", TORCHRUN.format(python=sys.executable, rank=tmp_path / "rank"))
    cluster = Cluster(1, 0, 1, python=str(tmp_path / "torchrun"))
    program(run / "node.sh", node_script(Plan(run, FLAGS, cluster, "a test")))
    code, said = interrupted("node.sh", run, "started")
    assert code == 0, said
    assert "asked to stop; the ranks save a checkpoint first" in said
    assert (run / "saved").exists()


FOLLOWED = """
import sys
from pathlib import Path
from megatron_infoentropy.launch.start import ORDERS
from megatron_infoentropy.launch.train import follow

run = Path(sys.argv[1])
script = (
    "trap 'for i in {1..9}; do echo saving $i; done; exit 0' HUP; touch $1/started; "
    "while :; do sleep 0.1; done"
)
follow(run, ["bash", "-c", script, "bash", str(run)], {}, sys.stdout.write, ORDERS)
(run / "saved").touch()
"""


def test_a_closed_terminal_does_not_end_the_one_who_waits_for_the_checkpoint(run):
    child, terminal = pty.fork()
    if child == 0:
        os.execv(sys.executable, [sys.executable, "-u", "-c", FOLLOWED, str(run)])
    deadline = time.monotonic() + 300
    while not (run / "started").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    os.close(terminal)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    assert (run / "saved").exists()
    assert (run / "train.log").read_text().splitlines()[-1] == "saving 9"


def test_words_given_to_the_scripts_run_instead_of_the_training(run, tmp_path):
    """On every host, whatever is in them: so `infoentropy doctor` looks at a job's nodes."""
    torchrun = f'#!/bin/sh\nprintf "%s\\n" "$@" > {run}/words\n'
    program(tmp_path / "torchrun", torchrun)
    program(tmp_path / "ssh", SSH.format(run=run))
    cluster = Cluster(1, 0, 1, hosts=(Address("a"),), python=str(tmp_path / "torchrun"))
    plan = Plan(run, FLAGS, cluster, "a test")
    program(run / "hosts.sh", hosts_script(plan))
    program(run / "node.sh", node_script(plan))
    words = ["--max-restarts", "0", "-m", "--", "a doctor", "it's", "--run", "$HOME"]
    path = f"{tmp_path}:{os.environ['PATH']}"
    subprocess.run(["bash", run / "hosts.sh", *words], env={**os.environ, "PATH": path}, check=True)
    said = (run / "words").read_text().splitlines()
    assert said[:2] == ["-m", "torch.distributed.run"]
    assert said[-len(words) :] == words
    assert "megatron_infoentropy.pretrain" not in said


def test_a_rank_that_is_torn_down_no_longer_hears_the_order_to_save():
    done = subprocess.run([sys.executable, "-c", TORN_DOWN], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "torn down"
