"""One fault after the other on one training, and what must hold after each."""

import hashlib
import json
import random
import time
from collections.abc import Callable
from pathlib import Path

from ranks_to_kill import ITERATIONS, RANKS, Training, run_to_end

Losses = dict[int, tuple[str, ...]]


def complete_iterations(save: Path) -> list[int]:
    """Which checkpoints are whole, found out without the package."""
    found = []
    for path in sorted(save.glob("iter_*/infoentropy_manifest.json")):
        try:
            files = json.loads(path.read_text())["files"]
            is_true = all(is_as_said(path.parent / name, files[name]) for name in files)
        except (OSError, ValueError, LookupError):
            continue
        if is_true:
            found.append(int(path.parent.name.removeprefix("iter_")))
    tracker = save / "latest_checkpointed_iteration.txt"
    named = tracker.read_text().strip() if tracker.exists() else "0"
    return [it for it in found if not named or it <= int(named)]


def is_as_said(path: Path, entry: dict[str, int | str | None]) -> bool:
    """Killed early, a training has left sizes alone."""
    data = path.read_bytes()
    digest = entry["sha256"] and hashlib.sha256(data).hexdigest()
    return (len(data), digest) == (entry["bytes"], entry["sha256"])


def check(training: Training, expected: int, losses: Losses) -> None:
    """The training started from the newest complete checkpoint and repeats the undisturbed one."""
    if training.losses:
        assert training.loaded == expected, (training.loaded, expected, training.log(0)[-2000:])
        assert min(training.losses) == expected + 1
    for iteration, values in training.losses.items():
        assert values == losses[iteration], (iteration, values, losses[iteration])


def disturb(
    folder: Path,
    losses: Losses,
    trials: int,
    seed: int,
    hit: Callable[[Training, random.Random], None],
) -> None:
    """Start the training so many times, each hit once, and at last undisturbed.

    It begins anew, in another folder, whenever it has come to its end.
    """
    rng, number = random.Random(seed), 0
    for trial in range(trials + 1):
        save = folder / f"save{number}"
        complete = complete_iterations(save)
        expected = complete[-1] if complete else 0
        if trial == trials:
            check(run_to_end(folder / "ranks", save), expected, losses)
            return
        with Training(folder / "ranks", save) as training:
            hit(training, rng)
        check(training, expected, losses)
        left = complete_iterations(save)
        assert set(complete[:-1]) <= set(left), f"lost {set(complete) - set(left)}"
        number += ITERATIONS in left


def kill_while_saving(training: Training, rng: random.Random) -> None:
    """Within the time that a save and its manifest take."""
    for _ in range(rng.randrange(1, 4)):
        seen = training.log(0).count("saving checkpoint")
        end = time.monotonic() + 300
        while training.log(0).count("saving checkpoint") == seen and time.monotonic() < end:
            if any(process.exitcode is not None for process in training.ranks):
                return
            time.sleep(0.002)
    time.sleep(rng.uniform(0, 0.25))
    training.kill(rng.randrange(RANKS))
