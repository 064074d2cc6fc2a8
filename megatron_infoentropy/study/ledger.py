"""Which steps of a piece of work are finished, proven by the hashes of what they wrote.

FOLDER/study.json, for every step that was begun:
    key       hash of all that its outputs depend on: its inputs, and the outputs of the step before
    outputs   sha256 of every file, once it has ended; a step without was ended by something else
    seconds   that it took

A step is finished if its key is the wanted one and every file still has its hash. So a change of
the study redoes what depends on it and nothing else, and nothing half-written is taken for whole.
"""

import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_infoentropy.study.reading import StudyError

FILE = "study.json"
_LOCK = ".study.lock"


@dataclass(frozen=True)
class Step:
    """A piece of work that writes `outputs`, files or folders below the ledger's folder.

    `inputs` is what they depend on besides the step before, as JSON values. `do` may find outputs
    that it wrote when it was ended before its time, with the same inputs.
    """

    name: str
    inputs: Any
    outputs: tuple[str, ...]
    do: Callable[[], object]


@dataclass(frozen=True)
class Progress:
    """The steps of a folder that are finished, and a hash of all that they wrote."""

    done: tuple[str, ...]
    seconds: float
    digest: str


def read_progress(folder: Path, steps: list[Step], after: str) -> Progress:
    """Which of the steps are finished, counted from the first; `after` is the digest of what they
    build upon."""
    entries, digest, seconds = _read(folder), after, 0.0
    done: list[str] = []
    for step in steps:
        entry = entries.get(step.name, {})
        if not _is_finished(folder, step, entry, _key(step, digest)):
            break
        digest = _digest_of(entry)
        seconds += entry["seconds"]
        done.append(step.name)
    return Progress(tuple(done), seconds, digest)


def run_steps(folder: Path, steps: list[Step], after: str) -> str:
    """Do what is not finished; returns the digest of all that the steps wrote.

    Raises:
        StudyError: the folder holds something else, or another process is at work in it.
    """
    _claim(folder)
    with _locked(folder):
        entries, digest = _read(folder), after
        for step in steps:
            key = _key(step, digest)
            if not _is_finished(folder, step, entries.get(step.name, {}), key):
                if entries.get(step.name, {}).get("key") != key:
                    _remove(folder, step)
                entries[step.name] = {"key": key}
                _write(folder, entries)
                start = time.monotonic()
                step.do()
                hashes = hash_files(folder, step.outputs)
                seconds = round(time.monotonic() - start, 1)
                entries[step.name] = {"key": key, "seconds": seconds, "outputs": hashes}
                _write(folder, entries)
            digest = _digest_of(entries[step.name])
    return digest


def hash_files(folder: Path, names: tuple[str, ...]) -> dict[str, str]:
    """{path below the folder: sha256} of files, and of all files in folders."""
    found = {}
    for name in names:
        path = folder / name
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            if file.is_file():
                with file.open("rb") as stream:
                    found[str(file.relative_to(folder))] = _hex(stream)
    return found


def digest_of(value: object) -> str:
    """Hash of a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def _hex(stream: Any) -> str:
    return hashlib.file_digest(stream, "sha256").hexdigest()


def _key(step: Step, before: str) -> str:
    return digest_of([step.name, step.inputs, before])


def _digest_of(entry: dict[str, Any]) -> str:
    return digest_of([entry["key"], entry["outputs"]])


def _is_finished(folder: Path, step: Step, entry: dict[str, Any], key: str) -> bool:
    if entry.get("key") != key or "outputs" not in entry:
        return False
    there = all((folder / name).exists() for name in step.outputs)
    return there and hash_files(folder, step.outputs) == entry["outputs"]


def _claim(folder: Path) -> None:
    if folder.is_dir() and any(folder.iterdir()) and not (folder / FILE).is_file():
        raise StudyError(
            f"{folder} holds something that this study did not make; move it away, or name another "
            "output"
        )
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / FILE).is_file():
        _write(folder, {})


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    with (folder / _LOCK).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StudyError(f"another process is at work in {folder}; wait for it") from None
        yield


def _remove(folder: Path, step: Step) -> None:
    for name in step.outputs:
        path = folder / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def _read(folder: Path) -> dict[str, dict[str, Any]]:
    try:
        entries: dict[str, dict[str, Any]] = json.loads((folder / FILE).read_text())["steps"]
        return entries
    except FileNotFoundError:
        return {}
    except (ValueError, KeyError) as error:
        raise StudyError(
            f"{folder / FILE} cannot be read ({error}); remove {folder} to begin it anew"
        ) from error


def _write(folder: Path, entries: dict[str, dict[str, Any]]) -> None:
    temporary = folder / f".{FILE}.{os.getpid()}.tmp"
    temporary.write_text(json.dumps({"format": 1, "steps": entries}, indent=1) + "\n")
    temporary.replace(folder / FILE)
