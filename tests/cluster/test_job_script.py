"""What job.slurm does when Slurm signals it, preempts it or gives it too little time."""

import os
import signal
import subprocess
import sys
import time
from datetime import datetime, timedelta

import fake_slurm
import pytest
from process_tree import send_to_all

from megatron_infoentropy.launch.cluster import Cluster
from megatron_infoentropy.launch.recipe import written_flags
from megatron_infoentropy.launch.scripts import Plan, job_script

FLAGS = tuple(written_flags({}, {}))
# Saves when it is asked to, as far as it is said to have trained; or ends when it is told to.
NODE = """
save() {{
  [ {step} -eq 0 ] || echo {step} > {run}/checkpoints/latest_checkpointed_iteration.txt
  echo "exiting program after receiving SIGTERM"
  exit 0
}}
trap save USR1 TERM
touch {run}/started
until [ -e {run}/end ]; do sleep 0.1; done
exit 3
"""


@pytest.fixture
def job(tmp_path):
    """Starts job.slurm of a run at step 4: (process, its run folder)."""
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    (run / "checkpoints/latest_checkpointed_iteration.txt").write_text("4")
    fake_slurm.install(tmp_path, quick=True)
    cluster = Cluster(1, 0, 1, slurm=(), save_s=100, max_requeues=2, python=sys.executable)
    flags = (*FLAGS, "--save", str(run / "checkpoints"))
    (run / "job.slurm").write_text(job_script(Plan(run, flags, cluster, "a test")))

    def start(step=7, remaining_s=None, wait=True, answers=True, restart=0, **says):
        (run / "node.sh").write_text(NODE.format(run=run, step=step))
        end = "Unknown"
        if remaining_s is not None:
            end = f"{datetime.now() + timedelta(seconds=remaining_s):%Y-%m-%dT%H:%M:%S}"
        says = {"EndTime": end, "PreemptTime": "None", **says}
        if answers:
            (tmp_path / "job").write_text(" ".join(f"{name}={what}" for name, what in says.items()))
        environment = {"SLURM_JOB_ID": "47", "SLURM_JOB_NODELIST": "localhost"}
        environment["SLURM_RESTART_COUNT"] = str(restart)
        with (run / "train.log").open("a") as log:
            process = subprocess.Popen(
                ["bash", run / "job.slurm"],
                env={**os.environ, **environment, "PATH": f"{tmp_path}:{os.environ['PATH']}"},
                stdout=log,
                stderr=log,
            )
        if wait:
            wait_for(run / "started")
            wait_for(tmp_path / "task")
        return process, run

    return start


def wait_for(path):
    deadline = time.monotonic() + 300
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(0.05)


def scontrol_words(run):
    words = run.parent / "scontrol.words"
    return words.read_text() if words.exists() else ""


def test_at_the_time_limit_it_is_requeued_if_a_step_was_saved_though_scontrol_show_fails(job):
    process, run = job(answers=False)
    process.send_signal(signal.SIGUSR1)
    assert process.wait(timeout=300) == 0
    assert scontrol_words(run) == "requeue 47\n"


def test_at_the_time_limit_it_is_not_requeued_for_nothing(job):
    process, run = job(step=0)
    process.send_signal(signal.SIGUSR1)
    assert process.wait(timeout=300) == 1
    assert scontrol_words(run) == ""
    assert (
        "== not requeued: up to the time limit no step was saved" in (run / "train.log").read_text()
    )


@pytest.mark.parametrize(("remaining_s", "trains"), [(60, False), (3600, True)])
def test_a_time_limit_in_which_it_could_not_train_is_refused(job, remaining_s, trains):
    process, run = job(remaining_s=remaining_s, wait=trains)
    if trains:
        (run / "end").touch()
    assert process.wait(timeout=300) == (3 if trains else 1)
    assert (run / "started").exists() == trains
    assert ("the time limit is too short to train" in (run / "train.log").read_text()) != trains


@pytest.mark.parametrize("step", [0, 7])
def test_preempted_it_is_requeued_though_nobody_signalled_it(job, step):
    """With a grace time Slurm tells the ranks alone, and calls the job ended when they are."""
    process, run = job(step, PreemptTime="2026-11-29T00:29:37")
    send_to_all(int((run.parent / "task").read_text()), signal.SIGTERM)
    assert process.wait(timeout=300) == 0
    assert scontrol_words(run) == "requeue 47\n"


@pytest.mark.parametrize("why", ["time limit", "preempted"])
def test_after_as_many_restarts_as_are_allowed_it_saves_and_ends(job, why):
    preempted = "2026-11-29T00:29:37" if why == "preempted" else "None"
    process, run = job(restart=2, PreemptTime=preempted)
    process.send_signal(signal.SIGUSR1)
    assert process.wait(timeout=300) == 1
    assert scontrol_words(run) == ""
    assert (run / "checkpoints/latest_checkpointed_iteration.txt").read_text() == "7\n"
    said = "== not requeued: this was restart 2, --max-requeues is 2; sbatch"
    assert said in (run / "train.log").read_text()


def test_a_restart_that_slurm_itself_made_beyond_those_allowed_starts_nothing(job):
    process, run = job(restart=3, wait=False)
    assert process.wait(timeout=300) == 1
    assert not (run / "started").exists()
    said = "== not started: this is restart 3, --max-requeues is 2; sbatch"
    assert said in (run / "train.log").read_text()


def test_what_ended_by_itself_is_not_requeued(job):
    process, run = job()
    (run / "end").touch()
    assert process.wait(timeout=300) == 3
    assert scontrol_words(run) == ""
