"""Dozens of faults of a kind, counted: `make test-slow`; the log is tools/results/faults_cpu.csv.

A loss is a trial after which the training did not go on from the newest complete checkpoint with
the losses of an undisturbed one; the first ends the test, so what is in the log has none.
"""

import csv
import os
import random
import subprocess
import time
from datetime import date
from pathlib import Path

import pytest
from ranks_to_kill import Training, run_to_end
from trials import complete_iterations, disturb, kill_any_rank, kill_while_saving

ROOT = Path(__file__).parents[2]
LOG = ROOT / "tools" / "results" / "faults_cpu.csv"
FIELDS = ("kind", "trials", "losses", "seconds", "commit", "date")

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def losses(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    return run_to_end(folder / "ranks", folder / "save").losses


def write_down(kind: str, trials: int, started: float) -> None:
    done = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True
    )
    seconds, today = round(time.monotonic() - started), date.today().isoformat()
    is_new = not LOG.exists()
    with LOG.open("a", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        if is_new:
            writer.writerow(FIELDS)
        writer.writerow([kind, trials, 0, seconds, done.stdout.strip(), today])


def damage(training: Training, rng: random.Random) -> None:
    """Cut off a file of the newest complete checkpoint while nothing runs: sizes are compared."""
    training.wait()
    newest = training.save / f"iter_{complete_iterations(training.save)[-1]:07d}"
    path = rng.choice(sorted(path for path in newest.iterdir() if path.stat().st_size))
    os.truncate(path, rng.randrange(path.stat().st_size))


@pytest.mark.parametrize(
    ("kind", "hit", "trials"),
    [
        ("kill -9 of a rank at any time", kill_any_rank, 50),
        ("kill -9 of a rank while a checkpoint is written", kill_while_saving, 20),
        ("a file of the newest checkpoint cut off", damage, 10),
    ],
)
def test_nothing_is_lost_before_the_last_complete_checkpoint(losses, tmp_path, kind, hit, trials):
    started = time.monotonic()
    disturb(tmp_path, losses, trials, 20261123, hit)
    write_down(kind, trials, started)
