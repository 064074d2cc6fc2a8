"""Training under Slurm and on two hosts, for real but for the scheduler and the machines.

Hosts are network namespaces with addresses of their own; Slurm and ssh are programs of a few lines
on PATH. Scripts, torchrun, its rendezvous, gloo's connections, Megatron and signals are real; ranks
start fast because they are forks of one process (`quick_ranks`).
"""

import json
import os
import signal
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fake_slurm
import pytest
from conftest import RECIPE, prepared
from namespaces import SSH, hosts, why_not

from megatron_infoentropy.evaluate.runlog import read_log
from megatron_infoentropy.launch.cluster import Cluster
from megatron_infoentropy.launch.start import start
from megatron_infoentropy.launch.train import TrainingFailed

STEPS, SAVED, TIMEOUT_S = 12, 4, 5
PATIENCE_S = 120


def wait_until(condition, log, process=None):
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        late = time.monotonic() > deadline
        if late or (process is not None and process.done()):
            raise AssertionError(f"the log ends:\n{log.read_text()[-4000:]}")
        time.sleep(0.02)


def ended(pid):
    try:
        return "State:\tZ" in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return True


def losses(run):
    return {i: line["objective"] for i, line in read_log(run / "train.log").training.items()}


def saved_in(run):
    tracker = run / "checkpoints/latest_checkpointed_iteration.txt"
    return int(tracker.read_text()) if tracker.exists() else 0


@pytest.fixture(scope="module")
def requeued(tokens, quick_ranks, tmp_path_factory):
    """One rank under Slurm, signalled soon, started again by Slurm to train `STEPS` in all."""
    run, folder = tmp_path_factory.mktemp("requeued") / "run", tmp_path_factory.mktemp("slurm")
    fake_slurm.install(folder)
    made = prepared(tokens, run, Cluster(slurm=("--time=8:00:00",)))
    log = run / "train.log"
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**quick_ranks, "PATH": f"{folder}:{os.environ['PATH']}"}.items():
            patch.setenv(name, value)
        said = start(made, RECIPE, lambda line: None)
        job = int((folder / "pid").read_text())
        wait_until(lambda: ended(job) or "iteration        3/" in log.read_text(), log)
        os.kill(job, signal.SIGUSR1)
        wait_until(lambda: ended(job), log)
        first = {"saved": saved_in(run), "steps": max(losses(run)), "log": log.read_text()}
        node = run / "node.sh"
        handler = "--exit-signal SIGUSR1"
        # On a busy machine the signal may come late: always some steps more than were trained.
        last = max(STEPS, first["saved"] + 2)
        node.write_text(node.read_text().replace(handler, f"{handler} --exit-interval {last}"))
        subprocess.run(["sbatch", run / "job.slurm"], check=True, capture_output=True)
        job = int((folder / "pid").read_text())
        wait_until(lambda: ended(job), log)
    return {"run": run, "slurm": folder, "said": said, "last": last, **first}


def test_a_signal_before_the_time_limit_saves_and_requeues(requeued):
    assert "Submitted batch job 77" in requeued["said"]
    assert requeued["saved"] == requeued["steps"], "steps that were trained were not saved"
    assert "before the time limit, or preempted: saving" in requeued["log"]
    assert not (requeued["run"] / "node-0.pid").exists()
    assert (requeued["slurm"] / "scontrol.words").read_text() == "requeue 77\n", "once, not twice"


def test_the_requeued_job_goes_on_to_the_end(requeued):
    run = requeued["run"]
    assert set(losses(run)) == set(range(1, requeued["last"] + 1))
    log = (run / "train.log").read_text()
    assert f"successfully loaded checkpoint from {run}/checkpoints" in log
    assert "== the training ended well" in log
    assert json.loads((run / "run.json").read_text())["parameters"] > 10_000


@pytest.fixture(scope="module")
def two_hosts(tmp_path_factory, quick_ranks):
    """Two namespaces, which the ssh on PATH enters meanwhile."""
    reason = why_not()
    if reason:
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("ssh")
    (folder / "ssh").write_text(SSH)
    (folder / "ssh").chmod(0o755)
    with hosts(2) as found, pytest.MonkeyPatch.context() as patch:
        names = " ".join(f"{host.address}={host.name}" for host in found)
        path = f"{folder}:{os.environ['PATH']}"
        for name, value in {**quick_ranks, "PATH": path, "HOSTS": names}.items():
            patch.setenv(name, value)
        try:
            yield found
        finally:
            for host in found:
                for pid in processes_on(host):
                    os.kill(pid, signal.SIGKILL)


def processes_on(host):
    done = subprocess.run(["ip", "netns", "pids", host.name], capture_output=True, text=True)
    return [int(pid) for pid in done.stdout.split() if not ended(pid)]


def cluster_of(found, **settings):
    return Cluster(
        nodes=len(found),
        hosts=tuple(host.address for host in found),
        interface="eth0",
        join_timeout_s=15,
        store_timeout_s=TIMEOUT_S,
        **settings,
    )


def assert_same_losses(run, reference, without):
    """`without`: what Megatron logs of the second step after a start is the mean of two."""
    expected, got = losses(reference), losses(run)
    common = set(expected) & set(got) - set(without)
    assert len(common) >= STEPS - 2
    for step in common:
        assert got[step] == pytest.approx(expected[step], rel=1e-5), f"step {step}"


def test_two_hosts_train_as_one_and_survive_that_one_is_cut_off(
    two_hosts, requeued, tokens, tmp_path
):
    run, log = tmp_path / "run", tmp_path / "run" / "train.log"
    flags = ("--save-interval", SAVED, "--distributed-timeout-seconds-after-init", TIMEOUT_S)
    made = prepared(tokens, run, cluster_of(two_hosts), *flags)
    with ThreadPoolExecutor(1) as pool:
        training = pool.submit(start, made, RECIPE, lambda line: None)
        wait_until(lambda: saved_in(run) >= SAVED, log, training)
        two_hosts[1].cut_off()
        cut = time.monotonic()
        with pytest.raises(TrainingFailed) as failure:
            training.result(timeout=PATIENCE_S)
    # Both the ranks' time-out and a few of the rendezvous' have passed, and no default of minutes.
    assert time.monotonic() - cut < 60
    said = str(failure.value)
    assert "a host or its network is gone, or a rank hangs: see which host" in said
    assert f"Timed out waiting {TIMEOUT_S}000ms" in said
    # node.sh's last `sleep` may take its seconds.
    wait_until(lambda: not any(processes_on(host) for host in two_hosts), log)
    assert list(run.glob("node-*.pid")) == []

    two_hosts[1].plug_in()
    at = saved_in(run)
    assert at % SAVED == 0
    steps = max(STEPS, at + 2)
    made = prepared(tokens, run, cluster_of(two_hosts), *flags, "--exit-interval", steps)
    assert "done; the run folder is" in start(made, RECIPE, lambda line: None)
    assert_same_losses(run, requeued["run"], {at + 2, requeued["saved"] + 2})
