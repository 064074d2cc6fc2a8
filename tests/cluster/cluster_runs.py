"""Trainings of a tiny model on the machines: their scripts, jobs, and what they leave behind.

Nothing here depends on how fast a machine is: `PATIENCE_S` only ends a test that hangs.
"""

import json
import os
import pydoc_data.topics
import re
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from light_run import text_of
from machines import Machine, Machines

from megatron_infoentropy.evaluate.runlog import read_log
from megatron_infoentropy.launch.cluster import Address, Cluster
from megatron_infoentropy.launch.job import TrainingJob
from megatron_infoentropy.launch.scripts import prepare, start, write
from megatron_infoentropy.launch.train import TrainingFailed

HERE = Path(__file__).parent
RECIPE = HERE.parents[1] / "examples" / "tiny.yaml"
SMALL = [
    *("--num-layers", "2", "--hidden-size", "32", "--ffn-hidden-size", "64"),
    *("--seq-length", "32", "--max-position-embeddings", "32", "--micro-batch-size", "4"),
    *("--global-batch-size", "8", "--eval-iters", "1", "--eval-interval", "100000"),
    *("--init-method-std", "0.1", "--lr-warmup-iters", "2"),
]
STEPS, SAVED = 12, 4
TENSOR, PIPELINE = ({f"{axis}-model-parallel-size": 2} for axis in ("tensor", "pipeline"))
TIMEOUT_S = 20  # of a collective: longer than a busy machine holds up one of two ranks
PATIENCE_S = 200  # less than any default of gloo's, torchrun's or the kernel's


def prepared(tokens, run, cluster, *extra, settings=None, python=sys.executable):
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
    made = prepare(job, replace(cluster, gpus_per_node=0, python=python), "a test")
    write(made, overwrite=True)
    return made


def complete_in(run):
    """The newest checkpoint that Megatron has named and that has its manifest, written after."""
    manifests = (run / "checkpoints").glob("iter_*/infoentropy_manifest.json")
    steps = [int(path.parent.name.removeprefix("iter_")) for path in manifests]
    return max([0, *(step for step in steps if step <= saved_in(run))])


def make_tokens(folder: Path) -> Path:
    """data/{train,validation,test} and a tokenizer, of a few help texts of Python's."""
    from megatron_infoentropy.data.preprocess import preprocess
    from megatron_infoentropy.data.tokenizer import train_tokenizer

    topics = sorted(pydoc_data.topics.topics.items())[:30]
    lines = [
        json.dumps({"text": text, "meta": {"pile_set_name": "AB"[i % 2]}})
        for i, (_, text) in enumerate(topics)
    ]
    corpus = folder / "text.jsonl"
    corpus.write_text("\n".join(lines) + "\n")
    train_tokenizer(corpus, folder / "tokenizer", vocab_size=500)
    preprocess([corpus], folder / "tokenizer", folder / "data" / "train")
    for split in ("validation", "test"):
        shutil.copytree(folder / "data" / "train", folder / "data" / split)
    return folder


def kill_connection(machines: Machines, node: str, program: str) -> None:
    """Kill what holds a node's connection on its own side (ssh) or on the other one (sshd)."""
    place = machines.head if program == "ssh" else machines.nodes[f"n{int(node) + 1}"]
    for pid in place.processes():
        words = words_of(pid).decode()
        if f"\0NODE={node} " in words if program == "ssh" else words.startswith("sshd: root@notty"):
            return os.kill(pid, signal.SIGKILL)
    raise AssertionError(f"no {program} of node {node}")


def train(made):
    """Follow a training to its end; what it said."""
    return start(made, RECIPE)


def undisturbed(tokens, run, ranks, steps, settings=None):
    """The same training on this machine, to its end."""
    cluster = Cluster(ranks_per_node=ranks, max_restarts=0)
    quick = os.environ.get("PYTHON_EXEC", sys.executable)  # nothing asks how its torchrun starts
    train(prepared(tokens, run, cluster, "--exit-interval", steps, settings=settings, python=quick))
    return run


def stop_at(run, steps):
    """Have the scripts of an endless training end it once it has trained so many."""
    node, handler = run / "node.sh", "--exit-signal SIGTERM"
    text = re.sub(r" --exit-interval \d+", "", node.read_text())
    node.write_text(text.replace(handler, f"{handler} --exit-interval {steps}"))


def until_step(run, job, step):
    """Wait until a job has trained a step."""
    wait_until(
        lambda: job.JobState not in ("PENDING", "RUNNING") or trained(run) >= step,
        run / "train.log",
        said=job.text,
    )
    assert job.JobState == "RUNNING", job.text()


def trained(run):
    """The last step in a log that is written to meanwhile."""
    steps = re.findall(r" iteration +(\d+)/", text_of(run / "train.log"))
    return int(steps[-1]) if steps else 0


def losses(run):
    return {i: line["objective"] for i, line in read_log(run / "train.log").training.items()}


def saved_in(run):
    return int(text_of(run / "checkpoints/latest_checkpointed_iteration.txt") or 0)


def wait_until(condition, log, process=None, said=str):
    """Wait for a condition; an AssertionError if the process ends or patience does before."""
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        if time.monotonic() > deadline or (process is not None and process.done()):
            raise AssertionError(f"{said()}\nthe log ends:\n{text_of(log)[-4000:]}")
        time.sleep(0.1)


class Job:
    """A job of the real Slurm, by its number."""

    def __init__(self, said: str) -> None:
        self.number = re.search(r"[Ss]ubmitted batch job (\d+)", said)[1]

    def __getattr__(self, name: str) -> str:
        """What scontrol says of it: JobState, Restarts, Reason, ..."""
        said = _say("scontrol", "--oneliner", "show", "job", self.number)
        return dict(word.split("=", 1) for word in said.split() if "=" in word)[name]

    def until(self, log: Path, *states: str, restarts: int = 0) -> None:
        """Wait until it is in one of these states, started anew so many times."""
        wait_until(
            lambda: self.JobState in states and int(self.Restarts) == restarts, log, said=self.text
        )

    def text(self) -> str:
        return _say("scontrol", "show", "job", self.number)

    def start_now(self) -> None:
        """Not two minutes later, as Slurm starts what was requeued.

        Not in the same second either, for which the nodes refuse whatever it starts.
        """
        time.sleep(1)
        _say("scontrol", "update", f"JobId={self.number}", "StartTime=now")

    def cancel(self, *words: str) -> None:
        _say("scancel", *words, self.number)


def ranks_on(machine: Machine) -> list[int]:
    """The ranks there, which are forks of the server: neither torchrun nor what it started."""
    return [pid for pid in machine.processes() if b"multiprocessing.forkserver" in words_of(pid)]


def words_of(pid: int) -> bytes:
    """A process's command line; nothing, if it has ended."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    return b""


def _say(*words: str) -> str:
    """What a program of Slurm says; its controller may be too busy to be reached, once."""
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode:
        time.sleep(1)
        done = subprocess.run(words, capture_output=True, text=True, check=True)
    return done.stdout


def assert_same_losses(run, reference, without):
    """`without`: what Megatron logs of the second step after a start is the mean of two."""
    expected, got = losses(reference), losses(run)
    common = set(expected) & set(got) - set(without)
    assert len(common) >= STEPS - 2
    for step in common:
        assert got[step] == pytest.approx(expected[step], rel=1e-5), f"step {step}"


@dataclass
class CutTraining:
    """A training on two machines, the second of which has lost its cable."""

    run: Path
    machines: Machines
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
        assert "node 0 (n1) ended with exit code 1" in self.log.read_text()
        hosts = self.machines.nodes.values()
        wait_until(lambda: not any(map(ranks_on, hosts)), self.log)
        assert list(self.run.glob("node-*.pid")) == []

    def go_on(self, *extra):
        """With the cable plugged in, for some steps more; the step from which it went on."""
        at = saved_in(self.run)
        assert at % SAVED == 0
        self.machines.nodes["n2"].plug_in()
        tokens, cluster, settings, flags = self.again
        until = ("--exit-interval", max(STEPS, at + 2))
        made = prepared(tokens, self.run, cluster, *flags, *until, *extra, settings=settings)
        with self.machines.on_path():
            assert "done; the run folder is" in train(made)
        return at


def train_until_cut_off(
    pool: ThreadPoolExecutor,
    machines: Machines,
    tokens: Path,
    run: Path,
    settings: dict | None = None,
    timeout: tuple = ("--distributed-timeout-seconds-after-init", TIMEOUT_S),
    **layout,
) -> CutTraining:
    """Train on two hosts and pull the cable of the second once a checkpoint is saved."""
    cluster = Cluster(
        nodes=len(machines.nodes),
        hosts=tuple(map(Address, machines.nodes)),
        interface="eth0",
        max_restarts=0,
        join_timeout_s=PATIENCE_S,
        **layout,
    )
    flags = ("--save-interval", SAVED, *timeout)
    made = prepared(tokens, run, cluster, *flags, settings=settings)
    patience = _ask_for_patience(made)
    with machines.on_path():
        training = pool.submit(train, made)
        wait_until(lambda: saved_in(run) >= SAVED, run / "train.log", training)
    machines.nodes["n2"].cut_off()
    patience.write_text("5")
    return CutTraining(run, machines, training, (tokens, cluster, settings, flags))


def _ask_for_patience(made):
    """Let a file say how long node.sh does without ranks: they start slowly on a busy machine."""
    run, limit = made.run, '[ "$idle" -ge "$patience" ]'
    patience, node = run / "patience", run / "node.sh"
    patience.write_text(str(PATIENCE_S))
    text = node.read_text()
    assert limit in text
    node.write_text(text.replace(limit, f'[ "$idle" -ge "$(cat {patience})" ]'))
    return patience
