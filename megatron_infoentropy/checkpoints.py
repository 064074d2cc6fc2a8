"""Which checkpoints are complete, which of them a training starts from, which are kept; no torch.

Below the folder given to `--save`:

    latest_checkpointed_iteration.txt        Megatron's tracker: "1000", or "release"
    infoentropy_checkpoints.json             what stood here before manifests were written
    iter_0001000/...                         Megatron's files
    iter_0001000/infoentropy_manifest.json   size and SHA-256 of each of them, written last

A checkpoint is complete when the tracker has named it and each file of its manifest is there with
its size; docs/checkpoints.md says what is loaded where it is not. One without a manifest is
unfinished where manifests are written, and as good as any where Megatron alone has saved:
`infoentropy_checkpoints.json` tells them apart. Checksums take a read of every byte, so they are
compared only where that was asked for (`infoentropy verify`, `convert`).
"""

import json
import os
import re
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from megatron_infoentropy.files import file_sha256, sync_folder, write_whole

TRACKER = "latest_checkpointed_iteration.txt"
RECORD = "infoentropy_checkpoints.json"
MANIFEST = "infoentropy_manifest.json"
RELEASE = "release"
DELETED = "deleted_"  # the name of a checkpoint that is being deleted starts with this
FORMAT = 1
THREADS = 8  # that read files; hashing lets them run side by side
_FOLDER = re.compile(r"iter_(\d{7,18})", re.ASCII)
_NAME = re.compile(rf"{RELEASE}|\d{{1,18}}", re.ASCII)


class DamagedCheckpointError(ValueError):
    """No checkpoint can be loaded; says which file is wrong and what can be done."""


@dataclass(frozen=True)
class Choice:
    """What to load: an iteration or "release", None for nothing, and what to tell the user."""

    name: str | None
    warning: str = ""
    changes_tracker: bool = False


def path_of(save: Path, name: str) -> Path:
    """Return the folder of the checkpoint that the tracker calls `name`."""
    return save / (name if name == RELEASE else f"iter_{int(name):07d}")


def read_tracker(save: Path) -> str | None:
    """Return what the tracker names: an iteration, "release", "" if damaged, None without one."""
    try:
        words = (save / TRACKER).read_text(encoding="utf-8", errors="replace").strip()
    except FileNotFoundError:
        return None
    return words if _NAME.fullmatch(words) else ""


def point_tracker(save: Path, name: str | None) -> None:
    """Have the tracker name this checkpoint; None removes it: a training starts anew."""
    if name is None:
        (save / TRACKER).unlink(missing_ok=True)
    else:
        write_whole(save / TRACKER, name)


def iterations(save: Path) -> list[int]:
    """Return the iterations that have a folder, in order."""
    matches = (_FOLDER.fullmatch(path.name) for path in save.iterdir() if path.is_dir())
    return sorted(int(match[1]) for match in matches if match)


def with_manifest(save: Path) -> list[int]:
    """Return the iterations that have a manifest, true or not, in order."""
    return [it for it in iterations(save) if has_manifest(path_of(save, str(it)))]


def begin_record(save: Path) -> None:
    """From now on a checkpoint without a manifest is unfinished, except for those here now."""
    if not (save / RECORD).is_file():
        save.mkdir(parents=True, exist_ok=True)
        named = read_tracker(save)
        newest = int(named) if named and named != RELEASE else -1
        names = [RELEASE] * (save / RELEASE).is_dir()
        names += [str(it) for it in iterations(save) if it <= newest]
        write_whole(save / RECORD, json.dumps({"format": 1, "before": names}) + "\n")


def saved_by_megatron(save: Path) -> list[str]:
    """Return the checkpoints that Megatron alone saved, which may lack a manifest, oldest first."""
    try:
        names = json.loads((save / RECORD).read_bytes())["before"]
        return [name for name in names if _NAME.fullmatch(name) and path_of(save, name).is_dir()]
    except FileNotFoundError:
        named = read_tracker(save)
        return [named] if named and not with_manifest(save) else []
    except (ValueError, LookupError, TypeError):
        return []


def choose(load: Path, step: int | None = None, *, is_ours: bool = True) -> Choice:
    """Choose the checkpoint to start from, by the sizes of its files; nothing is changed.

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
        reason, is_damaged = _reason_against(load, named)
        if not reason:
            folder = path_of(load, named)
            words = f"{folder} has no {MANIFEST}, since Megatron alone saved it: it is loaded"
            return Choice(named, "" if has_manifest(folder) else f"{words} unverified")
        if step is not None or named == RELEASE:
            raise DamagedCheckpointError(f"{reason}: name another checkpoint, or copy it again")
    for name in _before(load, named):
        other, other_is_damaged = _reason_against(load, name)
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
    """Return the checkpoints that may stand in for the one named, the newest first."""
    unverified = saved_by_megatron(load)
    known = {str(it) for it in with_manifest(load)} | set(unverified) - {RELEASE}
    newest = int(named) if named else max(map(int, known), default=0) + 1
    older = sorted((int(it) for it in known if int(it) < newest), reverse=True)
    return [*map(str, older), *([RELEASE] if RELEASE in unverified else [])]


def _reason_against(load: Path, name: str) -> tuple[str, bool]:
    """Return why this checkpoint cannot be loaded, or "", and whether it is damaged."""
    folder = path_of(load, name)
    if not folder.is_dir():
        return f"{folder} is not there", True
    if not has_manifest(folder):
        words = "since the training ended before all files were known to be on the disk"
        is_unfinished = name not in saved_by_megatron(load)
        return f"{folder} has no {MANIFEST}, {words}" * is_unfinished, False
    damage = find_damage(folder, checksums=False)
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


def write_manifest(folder: Path, *, checksums: bool = True) -> None:
    """Write the manifest of what is in a checkpoint's folder.

    Every file is on the disk, not only in memory, when the manifest appears.

    checksums: read every file; otherwise the manifest holds sizes alone, which are known at once.
    """
    paths = sorted(folder.rglob("*"))
    files = [path for path in paths if path.is_file() and not path.name.startswith(MANIFEST)]
    with ThreadPoolExecutor(THREADS) as pool:
        made = pool.map(lambda path: _entry(path, checksums), files)
        entries = {
            path.relative_to(folder).as_posix(): entry
            for path, entry in zip(files, made, strict=True)
        }
    for directory in (folder.parent, folder, *filter(Path.is_dir, paths)):
        sync_folder(directory)
    text = json.dumps({"format": FORMAT, "files": entries}, indent=1)
    write_whole(folder / MANIFEST, text + "\n")


def has_manifest(folder: Path) -> bool:
    """Return whether a checkpoint's folder has a manifest, true or not."""
    return (folder / MANIFEST).is_file()


def has_checksums(folder: Path) -> bool:
    """Return whether a manifest that is not damaged holds more than sizes."""
    return all(digest is not None for _, digest in _read(folder / MANIFEST).values())


def folders_with_manifest(place: Path) -> list[Path]:
    """Return one checkpoint's folder, or those in a --save folder; [] if it is neither."""
    if has_manifest(place) or not place.is_dir():
        return [place] if place.is_dir() else []
    names = [*map(str, with_manifest(place)), RELEASE]
    return [folder for name in names if has_manifest(folder := path_of(place, name))]


def find_damage(folder: Path, *, checksums: bool = True) -> str:
    """Return what is wrong with a checkpoint that has a manifest, naming the file; "" for nothing.

    checksums: read every file whose SHA-256 is known; otherwise only sizes are compared.
    """
    try:
        entries = _read(folder / MANIFEST)
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        return f"{folder / MANIFEST} is damaged ({type(error).__name__}: {error})"
    with ThreadPoolExecutor(THREADS) as pool:
        differences = pool.map(
            lambda name: _difference(folder / name, entries[name], checksums), sorted(entries)
        )
        return next((difference for difference in differences if difference), "")


def _entry(path: Path, checksums: bool) -> dict[str, Any]:
    with path.open("rb") as file:
        digest = file_sha256(path) if checksums else None
        os.fsync(file.fileno())
        return {"bytes": os.fstat(file.fileno()).st_size, "sha256": digest}


def _read(path: Path) -> dict[str, tuple[int, str | None]]:
    content = json.loads(path.read_bytes())
    if content["format"] != FORMAT:
        raise ValueError(f"expected format {FORMAT}, got {content['format']!r}")
    entries = {
        name: (int(entry["bytes"]), None if entry["sha256"] is None else str(entry["sha256"]))
        for name, entry in content["files"].items()
    }
    for name in entries:
        parts = PurePosixPath(name).parts
        if not parts or parts[0] == "/" or ".." in parts:
            raise ValueError(f"{name!r} lies outside of the checkpoint")
    return entries


def _difference(path: Path, expected: tuple[int, str | None], checksums: bool) -> str:
    size, digest = expected
    try:
        if (actual := path.stat().st_size) != size:
            return f"{path} has {actual} bytes, not {size}"
        if checksums and digest is not None and file_sha256(path) != digest:
            return f"{path} has another SHA-256 than when it was saved"
    except OSError as error:
        return f"{path} cannot be read: {error.strerror}"
    return ""


class ManifestWriter:
    """Writes manifests while a training saves, and deletes old checkpoints once newer ones stand.

    Megatron moves its tracker when a save is done, an asynchronous one too. `look`, called between
    steps, sees the tracker move; a thread then writes the manifest while training goes on, first
    with the sizes alone, so that the checkpoint is complete, then with the checksums. One rank has
    one, for one --save folder; leaving the `with` block waits for what is under way.

    keep_last: so many complete checkpoints stay; None keeps all.
    say: told one line where a manifest could not be written or an old checkpoint not be deleted.
    """

    def __init__(self, save: Path, keep_last: int | None, say: Callable[[str], object]) -> None:
        self._save, self._keep_last, self._say = save, keep_last, say
        begin_record(save)
        self._seen = self._tracker_state()
        self._thread = ThreadPoolExecutor(1)

    def look(self) -> None:
        """Have the manifest of a checkpoint written that was saved since the last call."""
        state = self._tracker_state()
        if state == self._seen:
            return
        self._seen = state
        name = read_tracker(self._save)
        if name:
            self._thread.submit(self._complete, name)

    def __enter__(self) -> "ManifestWriter":
        return self

    def __exit__(self, *error: object) -> None:
        self.look()
        self._thread.shutdown(wait=True)

    def _tracker_state(self) -> tuple[int, int] | None:
        """Return what tells two writings of the tracker apart, of the same iteration too."""
        try:
            stat = (self._save / TRACKER).stat()
        except FileNotFoundError:
            return None
        return stat.st_mtime_ns, stat.st_size

    def _complete(self, name: str) -> None:
        folder = path_of(self._save, name)
        failure = "could not be written, so this checkpoint does not count as complete"
        try:
            write_manifest(folder, checksums=False)
            failure = "holds sizes without checksums"
            write_manifest(folder)
        except OSError as error:
            self._say(f"WARNING: {folder / MANIFEST} {failure}: {error}")
            return
        if self._keep_last is not None and name.isdigit():
            self._delete_old(int(name), self._keep_last)

    def _delete_old(self, newest: int, keep_last: int) -> None:
        complete = [it for it in with_manifest(self._save) if it <= newest]
        for rest in self._save.glob(f"{DELETED}iter_*"):
            self._delete(rest)
        for iteration in complete[:-keep_last]:
            self._delete(path_of(self._save, str(iteration)))

    def _delete(self, folder: Path) -> None:
        try:
            # What is half deleted must not look like a checkpoint, and be found again later.
            if not folder.name.startswith(DELETED):
                folder = folder.rename(folder.with_name(f"{DELETED}{folder.name}"))
            shutil.rmtree(folder)
        except OSError as error:
            self._say(f"WARNING: {folder} could not be deleted: {error}")
