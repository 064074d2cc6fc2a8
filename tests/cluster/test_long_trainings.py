"""The long forms: time limits, preemption, lost nodes, killed ranks, hosts that are cut off."""

import os
import re
import signal
import subprocess
from concurrent.futures import ThreadPoolExecutor

import pytest
from cluster_runs import (
    PATIENCE_S,
    PIPELINE,
    STEPS,
    TENSOR,
    TIMEOUT_S,
    Job,
    assert_same_losses,
    complete_in,
    losses,
    prepared,
    ranks_on,
    saved_in,
    stop_at,
    train,
    train_until_cut_off,
    trained,
    undisturbed,
    until_step,
    wait_until,
)
from light_run import text_of
from machines import NODES

from megatron_infoentropy.launch.cluster import Address, Cluster

pytestmark = pytest.mark.slow
LOADED = re.compile(r"successfully loaded checkpoint from \S+ .*at iteration +(\d+)")
SECONDS = ("--distributed-timeout-seconds-after-init", TIMEOUT_S)


@pytest.fixture
def submitted(slurm, tokens, tmp_path):
    """Submits a training on two nodes, with options of sbatch and flags; (run folder, job)."""
    jobs = []

    def submit(*flags, options=(), settings=None, **cluster):
        run = tmp_path / "run"
        wanted = Cluster(2, slurm=options, **cluster)
        jobs.append(Job(train(prepared(tokens, run, wanted, *flags, settings=settings))))
        return run, jobs[-1]

    yield submit
    for job in jobs:
        job.cancel()


def requeued(run, job, times):
    """Wait until a job was requeued so often; the step that it saved."""
    job.until(run / "train.log", "PENDING", restarts=times)
    assert saved_in(run) > 0
    return saved_in(run)


def test_time_limits_requeue_it_until_it_ends_with_the_losses_of_an_undisturbed_run(
    submitted, tokens, tmp_path
):
    """Slurm's shortest limit is a minute, and its signal comes up to a minute early."""
    run, job = submitted(options=("--time=3",), save_s=60, settings=TENSOR)
    began = []
    for times in (1, 2):
        began.append(requeued(run, job, times))
        assert began[-1] == max(losses(run)), "steps that were trained were not saved"
        if times == 2:
            stop_at(run, began[-1] + STEPS)
        job.start_now()
    job.until(run / "train.log", "COMPLETED", restarts=2)
    log = (run / "train.log").read_text()
    assert log.count("s before the time limit, or preempted: saving") == 2
    assert "== the training ended well" in log
    last = began[-1] + STEPS
    assert set(losses(run)) == set(range(1, last + 1))
    reference = undisturbed(tokens, tmp_path / "one", 2, last, TENSOR)
    assert_same_losses(run, reference, {step + 2 for step in began})


@pytest.mark.parametrize("partition", ["hard", "low"])
def test_preempted_amid_training_it_loses_no_step(submitted, tokens, tmp_path, partition):
    run, job = submitted(options=(f"--partition={partition}",))
    until_step(run, job, 3)
    words = ("--partition=high", "--nodes=2", "--exclusive", "--output=/dev/null")
    other = Job(_said("sbatch", *words, "--wrap", "sleep 600"))
    saved = requeued(run, job, 1)
    assert saved == max(losses(run)), "steps that were trained were not saved"
    other.cancel()
    stop_at(run, saved + STEPS)
    job.start_now()
    job.until(run / "train.log", "COMPLETED", restarts=1)
    reference = undisturbed(tokens, tmp_path / "one", 1, saved + STEPS)
    assert_same_losses(run, reference, {saved + 2})


def _said(*words):
    return subprocess.run(words, capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("victim", NODES)
def test_a_node_that_dies_costs_the_steps_since_the_last_checkpoint(
    slurm, submitted, tokens, tmp_path, victim
):
    run, job = submitted("--save-interval", 10, *SECONDS)
    wait_until(lambda: complete_in(run) >= 10, run / "train.log", said=job.text)
    node = slurm.nodes[victim]
    node.power_off()
    job.until(run / "train.log", "PENDING", restarts=1)
    saved, reached = complete_in(run), trained(run)
    assert saved >= 10
    node.power_on()
    slurm.serve_ssh(victim)
    slurm.start_slurmd(victim)
    slurm.wait_for_nodes()
    stop_at(run, max(saved, reached) + STEPS)
    job.start_now()
    job.until(run / "train.log", "COMPLETED", restarts=1)
    assert LOADED.findall(text_of(run / "train.log")) == [str(saved)]
    reference = undisturbed(tokens, tmp_path / "one", 1, max(losses(run)))
    assert_same_losses(run, reference, {saved + 2})


@pytest.mark.parametrize("victim", NODES)
@pytest.mark.parametrize("is_slurm", [True, False], ids=["slurm", "ssh"])
def test_both_nodes_restart_their_ranks_when_one_is_killed(
    slurm, tokens, tmp_path, victim, is_slurm
):
    """The training has no end of its own, so that a fast one cannot end before the kill."""
    run, log = tmp_path / "run", tmp_path / "run" / "train.log"
    where = {"slurm": ()} if is_slurm else {"hosts": tuple(map(Address, NODES))}
    cluster = Cluster(2, max_restarts=1, join_timeout_s=PATIENCE_S, **where)
    made = prepared(tokens, run, cluster, "--save-interval", 10, *SECONDS)
    with ThreadPoolExecutor(1) as pool:
        training = pool.submit(train, made)
        job = Job(training.result()) if is_slurm else None
        process = None if is_slurm else training
        wait_until(lambda: complete_in(run) >= 10, log, process)
        os.kill(ranks_on(slurm.nodes[victim])[0], signal.SIGKILL)
        wait_until(lambda: LOADED.search(text_of(log)), log, process)
        at = int(LOADED.search(text_of(log))[1])
        wait_until(lambda: saved_in(run) >= at + 10, log, process)
        if job is not None:
            job.cancel("--signal=USR1")
            job.until(log, "COMPLETED")
        else:
            slurm.nodes["n1"].check("bash", "-c", f"kill -USR1 $(cat {run}/node-0.pid)")
            said = training.result(timeout=PATIENCE_S)
            assert said.startswith("stopped after saving a checkpoint")
    steps = max(losses(run))
    assert saved_in(run) == steps
    reference = undisturbed(tokens, tmp_path / "one", 1, steps)
    assert_same_losses(run, reference, {at + 2})


@pytest.mark.parametrize(
    ("settings", "ranks_per_node"),
    [(TENSOR, 2), (PIPELINE, 1)],
    ids=["tensor inside, data across", "pipeline across"],
)
def test_a_layout_over_two_hosts_survives_that_one_is_cut_off(
    machines, tokens, tmp_path, settings, ranks_per_node
):
    with ThreadPoolExecutor(1) as pool:
        run, layout = tmp_path / "run", {"ranks_per_node": ranks_per_node}
        # What gloo's send and receive wait for is set when their group is made, not after.
        minute = {"timeout": ("--distributed-timeout-minutes", 1)} if settings == PIPELINE else {}
        cut = train_until_cut_off(pool, machines, tokens, run, settings, **minute, **layout)
        cut.assert_ends_by_itself()
    at = cut.go_on()
    steps = max(losses(run))
    reference = undisturbed(tokens, tmp_path / "one", 2 * ranks_per_node, steps, settings)
    assert_same_losses(run, reference, {at + 2})
