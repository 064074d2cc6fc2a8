"""Training under Slurm and on two hosts, for real but for the scheduler and the machines.

Hosts are network namespaces with addresses of their own; Slurm and ssh are programs of a few lines
on PATH. Scripts, torchrun, its rendezvous, gloo's connections, Megatron and signals are real; ranks
start fast because they are forks of one process (`quick_ranks`).
"""

import json
import os
import signal
import subprocess
from concurrent.futures import ThreadPoolExecutor

import pytest
from cluster_runs import (
    STEPS,
    assert_same_losses,
    ended,
    losses,
    prepared,
    saved_in,
    text_of,
    train,
    train_until_cut_off,
    wait_until,
)
from namespaces import why_not
from process_tree import send_to_all

from megatron_infoentropy.launch.cluster import Cluster


@pytest.fixture(scope="module")
def cut(two_hosts, tokens, tmp_path_factory):
    """A training on two hosts that notices, while others are tested, that one was cut off."""
    with ThreadPoolExecutor(1) as pool:
        run = tmp_path_factory.mktemp("cut") / "run"
        yield train_until_cut_off(pool, two_hosts, tokens, run) if two_hosts else None


@pytest.fixture(scope="module")
def requeued(cut, programs, tokens, tmp_path_factory):
    """One rank under Slurm, signalled soon, started again by Slurm to train `STEPS` in all."""
    run = tmp_path_factory.mktemp("requeued") / "run"
    log, node = run / "train.log", run / "node.sh"
    said = train(prepared(tokens, run, Cluster(slurm=("--time=8:00:00",))))
    job = int((programs / "pid").read_text())
    wait_until(lambda: ended(job) or "iteration        3/" in text_of(log), log)
    os.kill(job, signal.SIGUSR1)
    wait_until(lambda: ended(job), log)
    first = {"saved": saved_in(run), "steps": max(losses(run)), "log": log.read_text()}
    # The signal may come late: always some steps more than were trained.
    last = max(STEPS, first["saved"] + 2)
    handler = "--exit-signal SIGTERM"
    node.write_text(node.read_text().replace(handler, f"{handler} --exit-interval {last}"))
    subprocess.run(["sbatch", run / "job.slurm"], check=True, capture_output=True)
    job = int((programs / "pid").read_text())
    wait_until(lambda: ended(job), log)
    return {"run": run, "said": said, "last": last, **first}


def test_a_signal_before_the_time_limit_saves_and_requeues(requeued, programs):
    number = (programs / "jobs").read_text().split()[0]
    assert f"Submitted batch job {number}" in requeued["said"]
    assert requeued["saved"] == requeued["steps"], "steps that were trained were not saved"
    assert "before the time limit, or preempted: saving" in requeued["log"]
    assert not (requeued["run"] / "node-0.pid").exists()
    assert (programs / "scontrol.words").read_text() == f"requeue {number}\n", "once, not twice"


def test_the_requeued_job_goes_on_to_the_end(requeued):
    run = requeued["run"]
    assert set(losses(run)) == set(range(1, requeued["last"] + 1))
    log = (run / "train.log").read_text()
    assert f"successfully loaded checkpoint from {run}/checkpoints" in log
    assert "== the training ended well" in log
    assert json.loads((run / "run.json").read_text())["parameters"] > 10_000


def test_a_job_that_slurm_cancels_saves_first(cut, programs, tokens, tmp_path):
    run, log = tmp_path / "run", tmp_path / "run" / "train.log"
    train(prepared(tokens, run, Cluster(slurm=())))
    job = int((programs / "pid").read_text())
    wait_until(lambda: ended(job) or "iteration        3/" in text_of(log), log)
    send_to_all(job, signal.SIGTERM)
    wait_until(lambda: ended(job), log)
    assert saved_in(run) == max(losses(run)) > 0
    assert log.read_text().endswith(
        "== stopped after saving a checkpoint; the next job goes on from there\n"
    )


def test_two_hosts_train_as_one_and_survive_that_one_is_cut_off(cut, requeued):
    if cut is None:
        pytest.skip(why_not())
    cut.assert_ends_by_itself()
    at = cut.go_on()
    assert_same_losses(cut.run, requeued["run"], {at + 2, requeued["saved"] + 2})
