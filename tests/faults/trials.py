"""What must hold after a fault."""

import hashlib
import json
from pathlib import Path

from ranks_to_kill import Training

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
