"""Count what faults at random moments cost a training on two machines: nothing that was saved.

    python tests/cluster/count_faults.py OUTPUT.csv [--seed N] [KIND=TRIALS ...]

A row a trial; trials that OUTPUT.csv has are not done again, so that a run that was cut goes on.
After each fault the checkpoints are looked at without the package: the next start must load the
newest complete one, no older than the one that was complete when the fault came, and must repeat,
digit by digit, what an undisturbed training logs.
"""

import argparse
import csv
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

HERE = Path(__file__).parent
sys.path += [str(HERE), *(str(HERE.parent / name) for name in ("", "faults", "integration"))]

from cluster_runs import (  # noqa: E402
    Job,
    complete_in,
    kill_connection,
    make_tokens,
    prepared,
    ranks_on,
    train,
    wait_until,
)
from launch import serve_ranks  # noqa: E402
from light_run import text_of  # noqa: E402
from machines import Machines, ended, machines, why_not  # noqa: E402
from trials import complete_iterations  # noqa: E402

from megatron_infoentropy.bench.results import provenance  # noqa: E402
from megatron_infoentropy.launch.cluster import Address, Cluster  # noqa: E402

TRIALS = {"rank killed": 50, "killed while saving": 20, "scancel": 20, "connection lost": 10}
FLAGS = ("--save-interval", 20, "--infoentropy-keep-last", 4)
FLAGS += ("--distributed-timeout-seconds-after-init", 20)
ANEW_AFTER = 1500  # steps, for the undisturbed training has to do them too
STEP = "InfoEntropy at iteration"
_LOADED = re.compile(r"successfully loaded checkpoint from \S+ .*at iteration +(\d+)")
_STEP = re.compile(r" InfoEntropy at iteration +(\d+) \| (perplexity: \S+).*(weight p99: \S+)")


class Training:
    """One run folder under Slurm or by ssh, started again and again."""

    def __init__(self, where: Machines, tokens: Path, run: Path, *, is_slurm: bool) -> None:
        self.where, self.run, self.log = where, run, run / "train.log"
        self.tokens, self.save, self.is_slurm = tokens, run / "checkpoints", is_slurm
        named = {"slurm": ()} if is_slurm else {"hosts": tuple(map(Address, where.nodes))}
        # A killed rank is started again by torchrun, in the same job.
        cluster = Cluster(2, max_restarts=1000 if is_slurm else 0, **named)
        self._plan = prepared(tokens, run, cluster, *FLAGS)
        self.started: Job | subprocess.Popen | None = None
        self.claimed = 0

    def start(self) -> None:
        with self.log.open("a") as log:
            if self.is_slurm:
                said = subprocess.run(self._plan.command, capture_output=True, text=True)
                self.started = Job(said.stdout)
            else:
                self.started = subprocess.Popen(self._plan.command, stdout=log, stderr=log)

    def runs(self) -> bool:
        if isinstance(self.started, Job):
            return self.started.JobState in ("PENDING", "RUNNING", "COMPLETING")
        return self.started is not None and self.started.poll() is None

    def until_ended(self) -> None:
        if isinstance(self.started, Job):
            wait_until(lambda: not self.runs(), self.log)
        else:
            self.started.wait(300)
        wait_until(lambda: not self.ranks(), self.log)

    def ranks(self) -> list[int]:
        return [pid for node in self.where.nodes.values() for pid in ranks_on(node)]

    def end(self) -> None:
        if isinstance(self.started, Job) and self.runs():
            self.started.cancel()
        if isinstance(self.started, subprocess.Popen) and self.runs():
            self.started.send_signal(signal.SIGTERM)
        if self.started is not None:
            self.until_ended()

    def note(self) -> None:
        """Take down, right before a fault, which checkpoint is complete."""
        self.claimed = complete_in(self.run)

    def said(self) -> str:
        """What the ranks said, also through a connection that is lost."""
        logs = [self.log] if self.is_slurm else [self.run / f"node-{n}.log" for n in (0, 1)]
        return "".join(map(text_of, logs))

    def until_more(self, words: str) -> None:
        """Wait until the log says it once more, or the training has ended."""
        count = self.said().count(words)
        wait_until(lambda: self.said().count(words) > count or not self.runs(), self.log)

    def loads(self) -> list[int]:
        return [int(step) for step in _LOADED.findall(self.said())]

    def steps(self) -> list[tuple[int, tuple[str, ...]]]:
        return [(int(m[1]), m.groups()[1:]) for m in _STEP.finditer(self.said())]

    def firsts(self) -> int:
        """How often it began with step 1."""
        return sum(step == 1 for step, _ in self.steps())


def kill_rank(training: Training, rng: random.Random) -> None:
    """Most often amid training, else while it starts."""
    if rng.random() < 0.8:
        training.until_more(STEP)
    time.sleep(rng.uniform(0, 2))
    _kill_and_wait(training, rng)


def kill_while_saving(training: Training, rng: random.Random) -> None:
    for _ in range(rng.randrange(1, 3)):
        training.until_more("saving checkpoint")
    time.sleep(rng.uniform(0, 0.25))
    _kill_and_wait(training, rng)


def _kill_and_wait(training: Training, rng: random.Random) -> None:
    wait_until(training.ranks, training.log)
    before = training.ranks()
    training.note()
    os.kill(rng.choice(before), signal.SIGKILL)
    wait_until(lambda: all(map(ended, before)), training.log)


def cancel(training: Training, rng: random.Random) -> None:
    """At any time from the submission on, most often amid training."""
    if rng.random() < 0.8:
        training.until_more(STEP)
    time.sleep(rng.uniform(0, 2))
    training.note()
    training.started.cancel()
    training.until_ended()


def lose_connection(training: Training, rng: random.Random) -> None:
    """Either end of a node's ssh, or the second node's cable."""
    training.until_more(STEP)
    time.sleep(rng.uniform(0, 2))
    kind = rng.choice(("ssh", "sshd", "cable"))
    training.note()
    if kind == "cable":
        training.where.nodes["n2"].cut_off()
    else:
        kill_connection(training.where, rng.choice("01"), kind)
    training.started.wait(400)
    training.where.nodes["n2"].plug_in()
    training.until_ended()


HITS = {
    "rank killed": kill_rank,
    "killed while saving": kill_while_saving,
    "scancel": cancel,
    "connection lost": lose_connection,
}


def trial(training: Training, kind: str, rng: random.Random) -> dict[str, int]:
    """One fault and the start after it: which steps were complete, trained and loaded."""
    if not training.runs():
        training.start()
    HITS[kind](training, rng)
    left = complete_iterations(training.save)
    trained = max([0, *(step for step, _ in training.steps())])
    loads, firsts = len(training.loads()), training.firsts()
    if not training.runs():
        training.start()
    anew = lambda: training.firsts() > firsts  # noqa: E731
    wait_until((lambda: len(training.loads()) > loads) if left else anew, training.log)
    loaded = training.loads()[-1] if left else 0
    return {
        "complete_before": training.claimed,
        "complete_after": left[-1] if left else 0,
        "trained": trained,
        "loaded": loaded,
    }


def require_nothing_lost(row: dict[str, int]) -> None:
    assert row["complete_before"] <= row["complete_after"] == row["loaded"], row


def require_repeated(training: Training) -> int:
    """Every step, however often it was trained, is that of an undisturbed training; how many."""
    training.end()
    steps = training.steps()
    last = max([0, *(step for step, _ in steps)])
    flags = (*FLAGS, "--exit-interval", last)
    folder = training.run.with_name(f"{training.run.name}-undisturbed")
    made = prepared(training.tokens, folder, Cluster(ranks_per_node=2, max_restarts=0), *flags)
    train(made)
    reference = {int(m[1]): m.groups()[1:] for m in _STEP.finditer(text_of(folder / "train.log"))}
    for step, values in steps:
        assert values == reference[step], (step, values, reference[step])
    return len(steps)


def run_kind(
    where: Machines, tokens: Path, folder: Path, kind: str, trials: list[int], seed: int
) -> Iterator[dict[str, object]]:
    """Do these trials of one kind; a row each."""
    training, number = None, 0
    for index in trials:
        if training is not None and training.steps()[-1][0] > ANEW_AFTER:
            require_repeated(training)
            training = None
        if training is None:
            number += 1
            run = folder / f"{kind.replace(' ', '-')}-{number}"
            training = Training(where, tokens, run, is_slurm=kind != "connection lost")
        row = trial(training, kind, random.Random(f"{seed} {kind} {index}"))
        require_nothing_lost(row)
        yield {"kind": kind, "seed": seed, "trial": index, **row}
    if training is not None:
        said = f"{kind}: {require_repeated(training)} logged steps as undisturbed"
        print(said, flush=True)  # noqa: T201


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("output", type=Path)
    parser.add_argument("--seed", type=int, default=20261129)
    parser.add_argument("kinds", nargs="*", metavar="KIND=TRIALS", default=[])
    asked = parser.parse_intermixed_args()
    if reason := why_not():
        sys.exit(reason)
    kinds = {name: int(count) for name, _, count in (text.partition("=") for text in asked.kinds)}
    with servers() as (where, tokens, folder):
        for kind, count in (kinds or TRIALS).items():
            known = _known(asked.output, kind, asked.seed)
            trials = [index for index in range(count) if index not in known]
            for row in run_kind(where, tokens, folder, kind, trials, asked.seed):
                append(asked.output, row)


@contextmanager
def servers() -> Iterator[tuple[Machines, Path, Path]]:
    """Machines with Slurm, and a data set; for a process that is no test."""
    with tempfile.TemporaryDirectory(prefix="faults-") as name, serve_ranks(Path(name)) as ranks:
        os.environ.update(ranks)
        with machines(ranks) as where, where.on_path():
            where.serve_slurm()
            yield where, make_tokens(Path(name)), Path(name)


def _known(output: Path, kind: str, seed: int) -> set[int]:
    if not output.exists():
        return set()
    with output.open(newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["kind"] == kind]
    return {int(row["trial"]) for row in rows if row["seed"] == str(seed)}


def append(output: Path, row: dict[str, object]) -> None:
    facts = provenance()
    row |= {name: facts[name] for name in ("device", "commit", "date")}
    is_new = not output.exists()
    with output.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(row), lineterminator="\n")
        if is_new:
            writer.writeheader()
        writer.writerow(row)


if __name__ == "__main__":
    main()
