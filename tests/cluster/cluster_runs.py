"""Trainings of a tiny model: their scripts, what they leave behind, and two hosts, one cut off.

Nothing here depends on how fast a machine is: `PATIENCE_S` only ends a test that hangs.
"""

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from namespaces import Host

from megatron_infoentropy.evaluate.runlog import read_log
from megatron_infoentropy.launch.cluster import Address, Cluster
from megatron_infoentropy.launch.job import TrainingJob
from megatron_infoentropy.launch.scripts import prepare, start, write
from megatron_infoentropy.launch.train import TrainingFailed

RECIPE = Path(__file__).parents[2] / "examples" / "tiny.yaml"
SMALL = [
    *("--num-layers", "2", "--hidden-size", "32", "--ffn-hidden-size", "64"),
    *("--seq-length", "32", "--max-position-embeddings", "32", "--micro-batch-size", "4"),
    *("--global-batch-size", "8", "--eval-iters", "1", "--eval-interval", "100000"),
    *("--init-method-std", "0.1", "--lr-warmup-iters", "2"),
]
STEPS, SAVED = 12, 4
TIMEOUT_S = 20  # of a collective: longer than a busy machine holds up one of two ranks
PATIENCE_S = 300  # less than any default of gloo's, torchrun's or the kernel's


def prepared(tokens, run, cluster, *extra, settings=None):
    """The scripts of a training of a tiny model, in its run folder; endless but for `extra`."""
    endless = ("--train-iters", 100000, "--lr-decay-iters", 100, "--log-interval", 1)
    settings = {"infoentropy-normalization": "global", **(settings or {})}  # the same in any layout
    job = TrainingJob(
        RECIPE,
        tokens / "data",
        tokens / "tokenizer",
        run,
        settings,
        extra_flags=(*SMALL, *map(str, (*endless, *extra))),
    )
    made = prepare(job, replace(cluster, gpus_per_node=0, python=sys.executable), "a test")
    write(made, overwrite=True)
    return made


def train(made):
    """Follow a training to its end; what it said."""
    return start(made, RECIPE)


def text_of(path):
    return path.read_text() if path.exists() else ""


def losses(run):
    return {i: line["objective"] for i, line in read_log(run / "train.log").training.items()}


def saved_in(run):
    return int(text_of(run / "checkpoints/latest_checkpointed_iteration.txt") or 0)


def wait_until(condition, log, process=None):
    """Wait for a condition; an AssertionError if the process ends or patience does before."""
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        if time.monotonic() > deadline or (process is not None and process.done()):
            raise AssertionError(f"the log ends:\n{text_of(log)[-4000:]}")
        time.sleep(0.1)


def ended(pid):
    try:
        return "State:\tZ" in Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return True


def processes_on(host):
    done = subprocess.run(["ip", "netns", "pids", host.name], capture_output=True, text=True)
    return [int(pid) for pid in done.stdout.split() if not ended(pid)]


def kill_all_on(hosts):
    for host in hosts:
        for pid in processes_on(host):
            os.kill(pid, signal.SIGKILL)


def assert_same_losses(run, reference, without):
    """`without`: what Megatron logs of the second step after a start is the mean of two."""
    expected, got = losses(reference), losses(run)
    common = set(expected) & set(got) - set(without)
    assert len(common) >= STEPS - 2
    for step in common:
        assert got[step] == pytest.approx(expected[step], rel=1e-5), f"step {step}"


@dataclass
class CutTraining:
    """A training on two hosts, the second of which has lost its cable."""

    run: Path
    hosts: list[Host]
    training: Future
    again: tuple  # arguments for `prepared`: the same training

    @property
    def log(self):
        return self.run / "train.log"

    def assert_ends_by_itself(self):
        """With a sentence of our table that speaks of the other host, and no process left."""
        with pytest.raises(TrainingFailed) as failure:
            self.training.result(timeout=PATIENCE_S)
        said = str(failure.value)
        assert "a host or its network is gone" in said or "lost its connection" in said, said
        assert "node 0 (10.213.7.1) ended with exit code 1" in self.log.read_text()
        wait_until(lambda: not any(processes_on(host) for host in self.hosts), self.log)
        assert list(self.run.glob("node-*.pid")) == []

    def go_on(self, *extra):
        """With the cable plugged in, for some steps more; the step from which it went on."""
        at = saved_in(self.run)
        assert at % SAVED == 0
        self.hosts[1].plug_in()
        tokens, cluster, settings, flags = self.again
        until = ("--exit-interval", max(STEPS, at + 2))
        made = prepared(tokens, self.run, cluster, *flags, *until, *extra, settings=settings)
        assert "done; the run folder is" in train(made)
        return at


def train_until_cut_off(
    pool: ThreadPoolExecutor,
    hosts: list[Host],
    tokens: Path,
    run: Path,
    settings: dict | None = None,
    timeout: tuple = ("--distributed-timeout-seconds-after-init", TIMEOUT_S),
    **layout,
) -> CutTraining:
    """Train on two hosts and pull the cable of the second once a checkpoint is saved."""
    cluster = Cluster(
        nodes=len(hosts),
        hosts=tuple(Address(host.address) for host in hosts),
        interface="eth0",
        max_restarts=0,
        join_timeout_s=PATIENCE_S,
        **layout,
    )
    flags = ("--save-interval", SAVED, *timeout)
    made = prepared(tokens, run, cluster, *flags, settings=settings)
    patience = _ask_for_patience(made)
    training = pool.submit(train, made)
    wait_until(lambda: saved_in(run) >= SAVED, run / "train.log", training)
    hosts[1].cut_off()
    patience.write_text("5")
    return CutTraining(run, hosts, training, (tokens, cluster, settings, flags))


def _ask_for_patience(made):
    """Let a file say how long node.sh does without ranks: they start slowly on a busy machine."""
    run, limit = made.run, '[ "$idle" -ge "$patience" ]'
    patience, node = run / "patience", run / "node.sh"
    patience.write_text(str(PATIENCE_S))
    text = node.read_text()
    assert limit in text
    node.write_text(text.replace(limit, f'[ "$idle" -ge "$(cat {patience})" ]'))
    return patience
