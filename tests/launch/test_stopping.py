"""Whoever asks it to stop, a training saves first; and of what it asks hosts and its folder."""

import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from process_tree import has_ended, send_to_all, wait_until

from megatron_infoentropy.launch.cluster import Cluster, parse_hosts
from megatron_infoentropy.launch.recipe import written_flags
from megatron_infoentropy.launch.scripts import (
    ORDERS,
    Plan,
    hosts_script,
    job_script,
    node_script,
    write,
)
from megatron_infoentropy.launch.train import SHOWN, TrainingFailed, follow, locked
from megatron_infoentropy.runtime.device import CPU_ENVIRONMENT

FLAGS = tuple(written_flags({}, {}))
RANK = """#!{python} -IS
import os, pathlib, signal, sys, time
run = pathlib.Path("{run}")

def save(number, frame):
    if {code}:
        sys.exit({code})
    for _ in range(5):
        time.sleep(0.05)
        os.write(1, b"saving\\n")
    (run / "saved").touch()
    sys.exit(0)

signal.signal(signal.SIGTERM, save)
with (run / "started").open("a") as started:
    started.write("once\\n")
for _ in range(600):
    os.write(1, b"a step\\n")
    time.sleep(0.1)
sys.exit(1)
"""


def program(path, text):
    path.write_text(text)
    path.chmod(0o755)


# As torchrun: of the signals it is told to handle it ends, and its rank; a dead one it restarts.
TORCHRUN = """#!{python} -IS
import os, signal, subprocess, sys, time

def end(number, frame):
    if rank.poll() is None:
        os.kill(rank.pid, number)
    sys.exit(1)

for name in os.environ.get("PET_SIGNALS_TO_HANDLE", "SIGTERM,SIGINT,SIGHUP,SIGQUIT").split(","):
    signal.signal(getattr(signal, name), end)
for _ in range(4):
    rank = subprocess.Popen(["{rank}"])
    if rank.wait() == 0:
        time.sleep(0.5)  # for other nodes
        sys.exit(0)
sys.exit(1)
"""


def wait_for(*paths):
    assert wait_until(lambda: all(path.exists() for path in paths))


def started(script, run):
    """A script of the run folder as a process, in a session of its own."""
    return subprocess.Popen(
        ["bash", run / script],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        # Who starts the tests in the background of a script has SIGINT ignored, for bash for ever.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def interrupted(script, run, at):
    """Start a script, press Ctrl-C twice once the file `at` is there; (exit code, what it said)."""
    training = started(script, run)
    wait_for(run / at)
    for _ in range(2):  # the terminal's, to all in the foreground; the second is impatience
        os.killpg(training.pid, signal.SIGINT)
        time.sleep(0.2)
    said, _ = training.communicate(timeout=300)
    return training.returncode, said


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A run folder with a rank; the scripts look ten times a second instead of once."""
    run = tmp_path / "run"
    run.mkdir()
    make_rank(run)
    program(tmp_path / "sleep", "#!/bin/sh\nexec /bin/sleep 0.1\n")
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    return run


def make_rank(run, code=0):
    """A rank that saves when it hears the order, or ends with this code."""
    text = RANK.format(python=sys.executable, run=run, code=code)
    program(run.parent / "rank", text)


def make_node(run):
    """node.sh of one rank, with a torchrun of a few lines."""
    rank = run.parent / "rank"
    program(run.parent / "torchrun", TORCHRUN.format(python=sys.executable, rank=rank))
    cluster = Cluster(1, 0, 1, python=str(run.parent / "torchrun"))
    text = node_script(Plan(run, FLAGS, cluster, "a test"))
    assert "flock -w 5 " in text  # seconds, for a training that is ending
    program(run / "node.sh", text.replace("flock -w 5 ", "flock -w 0 "))


def test_ctrl_c_to_one_node_saves_first(run):
    make_node(run)
    code, said = interrupted("node.sh", run, "started")
    assert code == 0, said
    assert SHOWN[0] in said
    assert (run / "saved").exists()
    assert not (run / "node-0.pid").exists()


def test_a_node_without_gpus_sets_what_its_ranks_need(run):
    make_node(run)
    script = (run / "node.sh").read_text()
    for name, value in CPU_ENVIRONMENT.items():
        assert f"export {name}=${{{name}:-{value}}}\n" in script


def test_an_order_that_comes_when_the_ranks_have_saved_at_that_of_another_node(run):
    """Torchrun is let end by itself then: a signal would make a failure of it."""
    program(run.parent / "rank", f"#!/bin/sh\n/bin/sleep 0.5\ntouch {run}/saved\n")
    make_node(run)
    code, said = interrupted("node.sh", run, "saved")
    assert code == 0, said


LEAVES_ITS_RANK = """#!{python} -IS
import os, pathlib, signal, subprocess, sys, time

def rank():
    rank = subprocess.Popen(["/bin/sleep", "600"], start_new_session=True)
    pathlib.Path("{run}/rank.pid").write_text(str(rank.pid))

def end(number, frame):
    rank()
    os._exit(1)

signal.signal(signal.SIGHUP, end)
if {has_ranks}:
    rank()
pathlib.Path("{run}/torchrun.pid").write_text(str(os.getpid()))
pathlib.Path("{run}/started").touch()
time.sleep(600)
"""


@pytest.mark.parametrize("end", ["while it starts a rank", "killed"])
def test_no_rank_outlives_its_torchrun(run, end):
    make_node(run)
    killed = end == "killed"
    torchrun = LEAVES_ITS_RANK.format(python=sys.executable, run=run, has_ranks=killed)
    program(run.parent / "torchrun", torchrun)
    if killed:
        training = started("node.sh", run)
        wait_for(run / "started")
        os.kill(int((run / "torchrun.pid").read_text()), signal.SIGKILL)
        said, _ = training.communicate(timeout=300)
        code = training.returncode
    else:
        code, said = interrupted("node.sh", run, "started")
    assert code == 1, said
    assert has_ended(int((run / "rank.pid").read_text()))


# The first look for ranks: an order comes, and a rank starts, once it has seen none.
CAT = """#!/bin/bash
if [[ $1 == */children && ! -e {run}/looked ]]; then
  touch {run}/looked
  until [ -e {run}/node-0.pid ]; do /bin/sleep 0.05; done
  kill -USR1 "$(< {run}/node-0.pid)"
  until [ -e {run}/started ]; do /bin/sleep 0.05; done
  exit
fi
exec /bin/cat "$@"
"""


def test_an_order_that_comes_as_the_first_rank_starts_has_it_save(run):
    make_node(run)
    program(run.parent / "cat", CAT.format(run=run))
    training = started("node.sh", run)
    said, _ = training.communicate(timeout=300)
    assert training.returncode == 0, said
    assert (run / "saved").exists()


def test_a_sigterm_to_every_process_saves_first(run):
    """So Slurm cancels, requeues and preempts."""
    make_node(run)
    training = started("node.sh", run)
    wait_for(run / "started")
    send_to_all(training.pid, signal.SIGTERM)
    said, _ = training.communicate(timeout=300)
    assert training.returncode == 0, said
    assert (run / "saved").exists()
    assert (run / "started").read_text() == "once\n"


def test_ranks_that_die_of_the_order_are_not_started_again(run):
    make_rank(run, code=3)
    make_node(run)
    code, said = interrupted("node.sh", run, "started")
    assert code == 1, said
    assert not (run / "saved").exists()
    assert (run / "started").read_text().count("once") <= 2


def test_ranks_whose_words_nobody_reads_any_more_train_on_and_save(run):
    make_node(run)
    training = started("node.sh", run)
    wait_for(run / "started")
    training.stdout.close()
    steps = (run / "node-0.log").read_text().count("a step")
    assert wait_until(lambda: (run / "node-0.log").read_text().count("a step") >= steps + 3)
    assert training.poll() is None
    os.kill(int((run / "node-0.pid").read_text()), signal.SIGUSR1)
    assert training.wait(timeout=300) == 0
    assert (run / "saved").exists()


def test_a_log_that_cannot_be_written_has_the_training_save_and_end(run):
    """The ranks say more than a pipe holds, which nobody reads any more."""
    make_node(run)
    rank = run.parent / "rank"
    program(rank, rank.read_text().replace('b"saving\\n"', 'b"saving\\n" * 20_000'))
    (run / "train.log").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left on device"):
        follow(run, ["bash", str(run / "node.sh")], {}, ORDERS)
    assert (run / "saved").exists()


# A host that runs what it is told to; a node that ends by itself, or at an order.
SSH = """#!/bin/bash
while [ "$1" = -o ]; do shift 2; done
{connects}
exec bash -c "${{*:2}}"
"""
NODE = """#!/bin/bash
echo $$ > {run}/node-$NODE.pid
trap 'touch {run}/saved-$NODE; exit 0' USR1
touch {run}/started-$NODE
until [ -e {run}/fails-$NODE ] || [ ! -d {run} ]; do sleep 0.1; done
exit 3
"""


def make_hosts(run, connects=":"):
    """hosts.sh of two hosts; `connects` is what ssh does first."""
    cluster = Cluster(2, 0, 1, hosts=parse_hosts("one,two"))
    program(run / "hosts.sh", hosts_script(Plan(run, FLAGS, cluster, "a test")))
    program(run / "node.sh", NODE.format(run=run))
    program(run.parent / "ssh", SSH.format(connects=connects))


SCONTROL = """#!/bin/sh
case $1 in
  show) echo "one PreemptTime=2026-01-01" ;;
  requeue) touch {run}/requeued ;;
esac
"""


def test_a_job_whose_words_a_full_disk_does_not_take_saves_and_is_requeued(run, monkeypatch):
    program(run.parent / "scontrol", SCONTROL.format(run=run))
    program(run.parent / "srun", NODE.replace("$NODE", "0").format(run=run))
    plan = Plan(run, FLAGS, Cluster(1, 0, 1, slurm=()), "a test")
    program(run / "job.slurm", job_script(plan))
    for name in ("SLURM_JOB_ID", "SLURM_JOB_NODELIST"):
        monkeypatch.setenv(name, "1")
    with Path("/dev/full").open("w") as full:
        job = subprocess.Popen(["bash", run / "job.slurm"], stdout=full, stderr=full)
    wait_for(run / "started-0")
    job.send_signal(signal.SIGUSR1)
    assert job.wait(timeout=300) == 0
    assert (run / "saved-0").exists()
    assert (run / "requeued").exists()


def test_a_host_that_fails_when_nobody_reads_any_more_has_the_others_save(run):
    make_hosts(run)
    training = started("hosts.sh", run)
    wait_for(run / "started-0", run / "started-1")
    training.stdout.close()
    (run / "fails-0").touch()
    assert training.wait(timeout=300) == 3
    assert (run / "saved-1").exists()


def test_ctrl_c_while_a_host_does_not_answer_leaves_no_ssh_behind(run):
    """Who reads what it says would wait for that."""
    make_hosts(run, f"echo $$ >> {run}/asked; exec /bin/sleep 600")
    code, said = interrupted("hosts.sh", run, "asked")
    assert code == 130, said


def test_a_run_folder_takes_one_training_at_a_time(run):
    make_node(run)
    training = started("node.sh", run)
    wait_for(run / "started")
    second = subprocess.run(["bash", run / "node.sh"], capture_output=True, text=True)
    taken = f"another training has the run folder {run}, process {training.pid} on"
    assert second.returncode == 1
    assert taken in second.stdout + second.stderr
    with pytest.raises(RuntimeError, match=taken), locked(run):
        pass
    # Before scripts and run.json say what another training has not done; a job of Slurm waits.
    for slurm, refusal in ((None, taken), ((), "differs from what this command line makes")):
        cluster = Cluster(1, 0, 1, slurm=slurm)
        with pytest.raises((RuntimeError, ValueError), match=refusal):
            write(Plan(run, FLAGS, cluster, "a test"))
    os.kill(training.pid, signal.SIGUSR1)
    training.communicate(timeout=300)
    for name in ("started", "saved"):
        (run / name).unlink()
    with locked(run):
        third = subprocess.run(["bash", run / "node.sh"], capture_output=True, text=True)
        taken = f"another training has the run folder {run}, process {os.getpid()} on"
        assert taken in third.stdout + third.stderr
    code, _ = interrupted("node.sh", run, "started")
    assert code == 0
    assert (run / "saved").exists()


FOLLOWED = """
import sys
from pathlib import Path

from megatron_infoentropy.launch.scripts import ORDERS
from megatron_infoentropy.launch.train import follow

run = Path(sys.argv[1])
script = (
    "step() { echo ' iteration        '$1'/       9 | objective: 1.0E+00 |'; }; "
    "trap 'for i in {1..9}; do step $i; done; exit 0' HUP; touch $1/started; "
    "while :; do sleep 0.1; done"
)
follow(run, ["bash", "-c", script, "bash", str(run)], {}, ORDERS)
(run / "saved").touch()
"""


def test_a_closed_terminal_does_not_end_the_one_who_waits_for_the_checkpoint(run):
    child, terminal = pty.fork()
    if child == 0:
        os.execv(sys.executable, [sys.executable, "-u", "-c", FOLLOWED, str(run)])
    wait_for(run / "started")
    os.close(terminal)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    assert (run / "saved").exists()
    assert (run / "train.log").read_text().splitlines()[-1].startswith(" iteration        9/")


def test_an_order_that_comes_while_the_scripts_are_started_reaches_them(run, monkeypatch):
    def late(*words, start=subprocess.Popen, **settings):
        os.kill(os.getpid(), signal.SIGUSR1)
        return start(*words, **settings)

    monkeypatch.setattr(subprocess, "Popen", late)
    with pytest.raises(TrainingFailed, match=f"exit code -{signal.SIGUSR1:d}"):
        follow(run, ["sleep", "20"], {}, (signal.SIGUSR1,))
