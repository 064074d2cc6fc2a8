"""Whoever asks it to stop, a training saves first; and of what it asks hosts and its folder."""

import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from light_run import LightRun, text_of, write_program
from process_tree import has_ended, send_to_all, wait_until

from megatron_infoentropy.launch.cluster import Cluster, parse_hosts
from megatron_infoentropy.launch.scripts import ORDERS, Plan, write
from megatron_infoentropy.launch.train import SHOWN, TrainingFailed, follow, locked
from megatron_infoentropy.runtime.device import CPU_ENVIRONMENT


def wait_for(*paths):
    assert wait_until(lambda: all(path.exists() for path in paths))


def ended(training):
    """The exit code of scripts, and what they said."""
    said, _ = training.communicate(timeout=300)
    return training.returncode, said


def interrupted(run, at):
    """Start scripts, press Ctrl-C once the file `at` is there; as `ended`."""
    training = run.start()
    wait_for(run.folder / at)
    return after_ctrl_c(training)


def after_ctrl_c(training):
    for _ in range(2):  # the terminal's, to all in the foreground; the second is impatience
        os.killpg(training.pid, signal.SIGINT)
        time.sleep(0.2)
    return ended(training)


@pytest.fixture
def new(tmp_path, monkeypatch):
    """Makes a run folder; its scripts look ten times a second instead of once."""
    write_program(tmp_path / "sleep", "#!/bin/sh\nexec /bin/sleep 0.1\n")
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")

    def make(cluster=Cluster(), **settings):  # noqa: B008
        run = LightRun(tmp_path / "run", cluster, **settings)
        node = run.folder / "node.sh"
        assert "flock -w 5 " in node.read_text()  # seconds, for a training that is ending
        node.write_text(node.read_text().replace("flock -w 5 ", "flock -w 0 "))
        return run

    return make


def test_ctrl_c_to_one_node_saves_first(new):
    run = new()
    code, said = interrupted(run, "started")
    assert code == 0, said
    assert SHOWN[0] in said
    assert run.has_saved()
    assert not (run.folder / "node-0.pid").exists()


def test_a_node_without_gpus_sets_what_its_ranks_need(new):
    script = (new().folder / "node.sh").read_text()
    for name, value in CPU_ENVIRONMENT.items():
        assert f"export {name}=${{{name}:-{value}}}\n" in script


def test_an_order_that_comes_when_the_ranks_have_saved_at_that_of_another_node(new):
    """Torchrun is let end by itself then: a signal would make a failure of it."""
    run = new()
    training = run.start()
    run.until_started()
    time.sleep(0.5)  # node.sh has seen the rank
    run.end(0)
    wait_for(run.folder / "ended-0")
    code, said = after_ctrl_c(training)
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
def test_no_rank_outlives_its_torchrun(new, end):
    run, killed = new(), end == "killed"
    settings = {"python": sys.executable, "run": run.folder, "has_ranks": killed}
    write_program(run.torchrun, LEAVES_ITS_RANK.format(**settings))
    if killed:
        training = run.start()
        wait_for(run.folder / "started")
        os.kill(int((run.folder / "torchrun.pid").read_text()), signal.SIGKILL)
        code, said = ended(training)
    else:
        code, said = interrupted(run, "started")
    assert code == 1, said
    assert has_ended(int((run.folder / "rank.pid").read_text()))


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


def test_an_order_that_comes_as_the_first_rank_starts_has_it_save(new, tmp_path):
    run = new()
    write_program(tmp_path / "cat", CAT.format(run=run.folder))
    code, said = ended(run.start())
    assert code == 0, said
    assert run.has_saved()


def test_a_sigterm_to_every_process_saves_first(new):
    """So Slurm cancels, requeues and preempts."""
    run = new()
    training = run.start()
    run.until_started()
    send_to_all(training.pid, signal.SIGTERM)
    code, said = ended(training)
    assert code == 0, said
    assert run.has_saved()
    assert len(run.started) == 1


def test_ranks_that_die_of_the_order_are_not_started_again(new):
    run = new(code=3)
    code, said = interrupted(run, "started")
    assert code == 1, said
    assert not run.has_saved()
    assert len(run.started) <= 2


def test_ranks_whose_words_nobody_reads_any_more_train_on_and_save(new):
    run = new()
    training = run.start()
    run.until_started()
    training.stdout.close()
    log = run.folder / "node-0.log"
    steps = text_of(log).count("a step")
    assert wait_until(lambda: text_of(log).count("a step") >= steps + 3)
    assert training.poll() is None
    os.kill(int((run.folder / "node-0.pid").read_text()), signal.SIGUSR1)
    assert training.wait(timeout=300) == 0
    assert run.has_saved()


def test_a_log_that_cannot_be_written_has_the_training_save_and_end(new):
    """The ranks say more than a pipe holds, which nobody reads any more."""
    run = new()
    rank = run.torchrun.read_text()
    run.torchrun.write_text(rank.replace('b"saving\\n"', 'b"saving\\n" * 20_000'))
    run.log.symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left on device"):
        follow(run.folder, run.command, {}, ORDERS)
    assert run.has_saved()


# A host that runs what it is told to.
SSH = """#!/bin/bash
while [ "$1" = -o ]; do shift 2; done
{connects}
exec bash -c "${{*:2}}"
"""
TWO_HOSTS = Cluster(2, hosts=parse_hosts("one,two"))


def test_a_host_that_fails_when_nobody_reads_any_more_has_the_others_save(new, tmp_path):
    run = new(TWO_HOSTS)
    write_program(tmp_path / "ssh", SSH.format(connects=":"))
    training = run.start()
    run.until_started()
    training.stdout.close()
    run.end(3)
    assert training.wait(timeout=300) == 3
    assert run.has_saved(node=1)


def test_ctrl_c_while_a_host_does_not_answer_leaves_no_ssh_behind(new, tmp_path):
    """Who reads what it says would wait for that."""
    run = new(TWO_HOSTS)
    asks = f"echo $$ >> {run.folder}/asked; exec /bin/sleep 600"
    write_program(tmp_path / "ssh", SSH.format(connects=asks))
    code, said = interrupted(run, "asked")
    assert code == 130, said


SCONTROL = """#!/bin/sh
case $1 in
  show) echo "one PreemptTime=2026-01-01" ;;
  requeue) touch {run}/requeued ;;
esac
"""
SRUN = """#!/bin/bash
trap 'touch {run}/saved-0; exit 0' USR1
touch {run}/started
while [ -d {run} ]; do sleep 0.1; done
"""


def test_a_job_whose_words_a_full_disk_does_not_take_saves_and_is_requeued(
    new, tmp_path, monkeypatch
):
    run = new(Cluster(slurm=()))
    for name, text in (("scontrol", SCONTROL), ("srun", SRUN)):
        write_program(tmp_path / name, text.format(run=run.folder))
    for name in ("SLURM_JOB_ID", "SLURM_JOB_NODELIST"):
        monkeypatch.setenv(name, "1")
    with Path("/dev/full").open("w") as full:
        job = subprocess.Popen(["bash", run.folder / "job.slurm"], stdout=full, stderr=full)
    wait_for(run.folder / "started")
    job.send_signal(signal.SIGUSR1)
    assert job.wait(timeout=300) == 0
    assert run.has_saved()
    assert (run.folder / "requeued").exists()


def test_a_run_folder_takes_one_training_at_a_time(new):
    run = new()

    def refused(number):
        """What a second start says; that it names the process which has the folder."""
        code, said = ended(run.start())
        assert code == 1
        taken = f"another training has the run folder {run.folder}, process {number} on"
        assert taken in said
        return taken

    training = run.start()
    run.until_started()
    taken = refused(training.pid)
    with pytest.raises(RuntimeError, match=taken), locked(run.folder):
        pass
    # Before scripts and run.json say what another training has not done; a job of Slurm waits.
    for slurm, refusal in ((None, taken), ((), "differs from what this command line makes")):
        cluster = Cluster(1, 0, 1, slurm=slurm)
        with pytest.raises((RuntimeError, ValueError), match=refusal):
            write(Plan(run.folder, run.plan.flags, cluster, "a test"))
    os.kill(training.pid, signal.SIGUSR1)
    assert ended(training)[0] == 0
    with locked(run.folder):
        refused(os.getpid())
    (run.folder / "started").unlink()
    assert interrupted(run, "started")[0] == 0


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


def test_a_closed_terminal_does_not_end_the_one_who_waits_for_the_checkpoint(tmp_path):
    child, terminal = pty.fork()
    if child == 0:
        os.execv(sys.executable, [sys.executable, "-u", "-c", FOLLOWED, str(tmp_path)])
    wait_for(tmp_path / "started")
    os.close(terminal)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    assert (tmp_path / "saved").exists()
    assert (tmp_path / "train.log").read_text().splitlines()[-1].startswith(" iteration        9/")


def test_an_order_that_comes_while_the_scripts_are_started_reaches_them(tmp_path, monkeypatch):
    def late(*words, start=subprocess.Popen, **settings):
        os.kill(os.getpid(), signal.SIGUSR1)
        return start(*words, **settings)

    monkeypatch.setattr(subprocess, "Popen", late)
    with pytest.raises(TrainingFailed, match=f"exit code -{signal.SIGUSR1:d}"):
        follow(tmp_path, ["sleep", "20"], {}, (signal.SIGUSR1,))
