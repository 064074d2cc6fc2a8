"""What becomes of a Slurm job that is signalled, cancelled, preempted, or loses a node.

Slurm and the scripts are real, what trains is a program of a few lines (`light_run`).
"""

import os
import signal
import subprocess

import pytest
from cluster_runs import Job, wait_until, words_of
from light_run import LightRun

from megatron_infoentropy.launch.cluster import Cluster

STOPPED = "== stopped after saving a checkpoint; the next job goes on from there"


@pytest.fixture(scope="session")
def quick_ranks():
    """No ranks here are Megatron's."""
    return {}


@pytest.fixture
def new(slurm, tmp_path):
    """Makes run folders, of one node and of a training that saves at step 7."""

    def make(*options: str, nodes: int = 1, step: int = 7, **settings) -> LightRun:
        folder = tmp_path / f"run{len(list(tmp_path.iterdir()))}"
        return LightRun(folder, Cluster(nodes, slurm=options, save_s=100, **settings), step)

    yield make
    subprocess.run(["scancel", "--user=root", "--signal=KILL"])
    subprocess.run(["scancel", "--user=root"])


def submit(run: LightRun, *, waits: bool = True) -> Job:
    job = Job(subprocess.run(run.command, capture_output=True, text=True, check=True).stdout)
    if waits:
        run.until_started()
    return job


def last_words(run: LightRun) -> str:
    return run.log.read_text().rstrip().rpartition("\n")[2]


def test_usr1_to_its_steps_saves_and_ends_it(new):
    run = new(nodes=2)
    job = submit(run)
    assert run.started == ["node 0 of 2 CPUs", "node 1 of 2 CPUs"]  # bound to none of them
    job.cancel("--signal=USR1")
    job.until(run.log, "COMPLETED")
    assert run.saved == 7
    assert last_words(run) == STOPPED


def test_scancel_saves_first(new):
    run = new(nodes=2)
    job = submit(run)
    job.cancel()
    job.until(run.log, "CANCELLED")
    wait_until(lambda: last_words(run) == STOPPED, run.log)
    assert run.saved == 7


def test_usr1_to_its_script_saves_and_requeues_it_as_the_time_limit_does(new):
    run = new()
    job = submit(run)
    second = submit(run, waits=False)
    job.cancel("--batch", "--signal=USR1")
    job.until(run.log, "PENDING", restarts=1)
    assert run.saved == 7
    assert "before the time limit, or preempted: saving" in run.log.read_text()
    assert second.Reason == "Dependency"  # of one run folder, one at a time
    job.start_now()
    run.until_started(2)
    job.cancel()
    job.until(run.log, "CANCELLED", restarts=1)
    run.until_started(3)
    assert second.JobState == "RUNNING"


def test_a_time_limit_up_to_which_no_step_is_saved_does_not_requeue_it(new):
    run = new(step=0)
    job = submit(run)
    job.cancel("--batch", "--signal=USR1")
    job.until(run.log, "FAILED")
    assert "== not requeued: up to the time limit no step was saved" in run.log.read_text()


def test_a_time_limit_in_which_it_could_not_train_is_refused(new):
    """Slurm's own signal would come at once."""
    run = new("--time=2")
    job = submit(run, waits=False)
    job.until(run.log, "FAILED")
    assert not run.started
    assert "the time limit is too short to train" in run.log.read_text()


def test_what_ends_by_itself_is_not_requeued(new):
    run = new("--time=60")
    job = submit(run)
    run.end(3)
    job.until(run.log, "FAILED")
    assert job.ExitCode == "3:0"


@pytest.fixture
def user_signal(slurm, request):
    """Slurm gives notice of a preemption by the job's own signal, or, as by default, does not."""
    if request.param:
        slurm.reconfigure(SlurmctldParameters="preempt_send_user_signal")
    yield request.param
    slurm.reconfigure()


@pytest.mark.parametrize(
    ("partition", "user_signal", "step"),
    [("hard", False, 7), ("low", False, 0), ("low", True, 7)],
    ids=["at once", "with grace, before a step", "with the signal it asked for"],
    indirect=["user_signal"],
)
def test_preempted_it_saves_and_is_requeued(new, partition, user_signal, step):
    run = new(f"--partition={partition}", nodes=2, step=step)
    job = submit(run)
    other = Job(_sbatch("--partition=high", "--nodes=2", "--exclusive", "--wrap", "sleep 600"))
    job.until(run.log, "PENDING", restarts=1)
    wait_until(lambda: other.JobState == "RUNNING", run.log, said=other.text)
    assert run.saved == (step or 4)
    other.cancel()
    job.start_now()
    run.until_started(2)
    job.cancel()
    job.until(run.log, "CANCELLED", restarts=1)


def _sbatch(*words):
    words = ("sbatch", "--output=/dev/null", *words)
    return subprocess.run(words, capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("why", ["time limit", "preempted"])
def test_after_as_many_restarts_as_are_allowed_it_saves_and_ends(new, why):
    run = new(max_requeues=1)
    job = submit(run)
    job.cancel("--batch", "--signal=USR1")
    job.until(run.log, "PENDING", restarts=1)
    run.tracker.write_text("5")  # the next start saves step 7 too
    job.start_now()
    run.until_started(2)
    if why == "preempted":
        Job(_sbatch("--partition=high", "--nodes=2", "--exclusive", "--wrap", "sleep 600"))
    else:
        job.cancel("--batch", "--signal=USR1")
    said = "== not requeued: this was restart 1, --max-requeues is 1; sbatch"
    wait_until(lambda: said in run.log.read_text(), run.log, said=job.text)
    wait_until(lambda: job.JobState not in ("RUNNING", "COMPLETING"), run.log, said=job.text)
    assert job.JobState in ("FAILED", "PREEMPTED")
    assert run.saved == 7


def test_a_restart_that_slurm_itself_made_beyond_those_allowed_starts_nothing(new):
    run = new(max_requeues=0)
    job = submit(run)
    subprocess.run(["scontrol", "requeue", job.number], check=True)
    job.until(run.log, "PENDING", restarts=1)
    job.start_now()
    job.until(run.log, "FAILED", restarts=1)
    assert len(run.started) == 1
    assert "== not started: this is restart 1, --max-requeues is 0; sbatch" in run.log.read_text()


@pytest.mark.slow  # scontrol itself waits
def test_a_controller_that_does_not_answer_ends_no_job(new, slurm):
    run = new()
    job = submit(run)
    slurm.stop_controller()
    _signal_script(slurm)
    wait_until(lambda: "controller does not answer" in run.log.read_text(), run.log)
    assert run.saved == 7
    slurm.start_controller()
    slurm.wait_for_nodes()
    job.until(run.log, "PENDING", restarts=1)


def _signal_script(slurm):
    for pid in [pid for node in slurm.nodes.values() for pid in node.processes()]:
        if b"slurm_script" in words_of(pid):
            os.kill(pid, signal.SIGUSR1)
