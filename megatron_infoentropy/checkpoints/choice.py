"""Which checkpoint a training starts from: the tracker's if it is complete, else one before it.

1.  The tracker's checkpoint, or the one of --ckpt-step: is its manifest there and true?
2.  If not, the newest complete one before it; the tracker is set to that, since Megatron and the
    other tools go by the tracker.
3.  If there is none, and nothing was damaged, only not finished, the training starts anew, as it
    would have a moment earlier; what is damaged is left for the user to decide.

The tracker of another training's folder is never changed: 2 and 3 are errors there.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from megatron_infoentropy.checkpoints.folder import (
    RECORD,
    RELEASE,
    TRACKER,
    foreign,
    path_of,
    read_tracker,
    with_manifest,
)
from megatron_infoentropy.checkpoints.manifest import (
    NAME,
    find_damage,
    has_checksums,
    has_manifest,
)

Check = Callable[[Path], str]  # a checkpoint's folder -> what is wrong with it, "" for nothing


class DamagedCheckpointError(ValueError):
    """No checkpoint can be loaded; says which file is wrong and what can be done."""


@dataclass(frozen=True)
class Choice:
    """What to load: an iteration or "release", None for nothing, and what to tell the user."""

    name: str | None
    warning: str = ""
    changes_tracker: bool = False


def choose(
    load: Path, step: int | None = None, check: Check = find_damage, *, is_ours: bool = True
) -> Choice:
    """Choose the checkpoint to start from; nothing is changed.

    load: what --load names. step: --ckpt-step, an iteration that no other may stand in for.
    is_ours: whether the training saves to `load` too, so that its tracker may be changed.

    Raises:
        DamagedCheckpointError: there are checkpoints, and none that can be loaded.
    """
    named = read_tracker(load) if step is None else str(step)
    if named is None:
        return _without_tracker(load)
    if not named:
        reason, is_damaged = f"{load / TRACKER} is damaged", not (load / RECORD).is_file()
    else:
        reason, is_damaged = _reason_against(load, named, check)
        if not reason:
            return Choice(named, _unverified(path_of(load, named)))
        if step is not None or named == RELEASE:
            raise DamagedCheckpointError(f"{reason}: name another checkpoint, or copy it again")
    for name in _before(load, named):
        other, other_is_damaged = _reason_against(load, name, check)
        if not other and not is_ours:
            raise DamagedCheckpointError(_not_ours(load, reason, name))
        if not other:
            words = f"training goes on from {path_of(load, name)}, the newest complete one before"
            return Choice(name, f"{reason}: {words}", changes_tracker=True)
        reason, is_damaged = f"{reason}; {other}", is_damaged or other_is_damaged
    if is_damaged:
        raise DamagedCheckpointError(
            f"{reason}; and no complete checkpoint stands before it in {load}: copy it again, or "
            "give another --load"
        )
    if not is_ours:
        raise DamagedCheckpointError(_not_ours(load, reason, None))
    words = "and no complete one stands before it: training starts at iteration 0"
    return Choice(None, f"{reason}, {words}", changes_tracker=True)


def _not_ours(load: Path, reason: str, name: str | None) -> str:
    words = f"{reason}; {load} is not this training's --save, so its tracker is left alone"
    if name is None:
        return f"{words}, and no complete checkpoint stands there: give another"
    by_step = "" if name == RELEASE else f"give --ckpt-step {name}, or "
    return f"{words}: to load {path_of(load, name)}, {by_step}write {name} into the tracker"


def _before(load: Path, named: str) -> list[str]:
    """Checkpoints that may stand in for the one named, the newest first."""
    iterations = {str(it) for it in with_manifest(load)} | set(foreign(load)) - {RELEASE}
    newest = int(named) if named else max(map(int, iterations), default=0) + 1
    older = sorted((int(it) for it in iterations if int(it) < newest), reverse=True)
    return [*map(str, older), *([RELEASE] if RELEASE in foreign(load) else [])]


def _unverified(folder: Path) -> str:
    """What of a checkpoint that is loaded could not be compared; "" for nothing."""
    if not has_manifest(folder):
        return f"{folder} has no {NAME}, since Megatron alone saved it: it is loaded unverified"
    if not has_checksums(folder):
        return (
            f"{folder / NAME} holds no checksums, since the training ended before they were made: "
            "only the files' sizes were verified"
        )
    return ""


def _reason_against(load: Path, name: str, check: Check) -> tuple[str, bool]:
    """(why this checkpoint cannot be loaded or "", whether it is damaged, not only unfinished)."""
    folder = path_of(load, name)
    if not folder.is_dir():
        return f"{folder} is not there", True
    if not has_manifest(folder):
        words = "since the training ended before all files were known to be on the disk"
        return f"{folder} has no {NAME}, {words}" * (name not in foreign(load)), False
    damage = check(folder)
    return damage, bool(damage)


def _without_tracker(load: Path) -> Choice:
    complete = with_manifest(load) if load.is_dir() else []
    if not complete:
        return Choice(None)
    return Choice(
        None,
        f"{load / TRACKER} is not there, so nothing is loaded; to go on from iteration "
        f"{complete[-1]}, write this number into it",
    )
