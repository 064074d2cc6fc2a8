"""Which steps of a piece of work are finished, proven by the hashes of what they wrote.

FOLDER/study.json, for every step that was begun:
    key       hash of all that its outputs depend on: its inputs, and the outputs of the step before
    outputs   size, time and sha256 of every file, once it has ended; a step without was ended by
              something else
    seconds   that it took

and below "given" the same of the files that the first step builds upon, by their folder.

A step is finished if its key is the wanted one and every file still has its hash. A file whose
size and time of change are as recorded is not read again. So a change of the study redoes what
depends on it and nothing else, and nothing half-written is taken for whole.

A record of a file is [size in bytes, mtime in ns, sha256], as `study.json` holds it.
"""

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_infoentropy.files import take_lock, write_whole
from megatron_infoentropy.study.plan import StudyError

FILE = "study.json"
_LOCK = ".study.lock"
_FORMAT = 2
_THREADS = 8  # hashing lets them run side by side

Record = tuple[int, int, str]
Records = dict[str, Record]  # by path below a folder
Entry = dict[str, Any]
Given = dict[str, Records]  # by folder


def hash_files(folder: Path, names: tuple[str, ...], known: Mapping[str, Record]) -> Records:
    """Return records of files, and of all files in folders; `known` is what was recorded."""
    files: dict[str, Path] = {}
    for name in names:
        path = folder / name
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            if file.is_file():
                files[str(file.relative_to(folder))] = file
    with ThreadPoolExecutor(_THREADS) as pool:
        records = pool.map(lambda name: _record(files[name], known.get(name)), files)
        return dict(zip(files, records, strict=True))


def hashes_of(records: Mapping[str, Record]) -> dict[str, str]:
    """Return {path: sha256}: what counts, whenever the files were written."""
    return {name: digest for name, (_, _, digest) in records.items()}


def _record(path: Path, known: Record | None) -> Record:
    with path.open("rb") as file:
        status = os.fstat(file.fileno())  # before reading: what changes meanwhile is read again
        if known is not None and known[:2] == (status.st_size, status.st_mtime_ns):
            return known
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return status.st_size, status.st_mtime_ns, digest


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
    """The steps of a folder that are finished and that are not; a hash of all that they wrote."""

    done: tuple[str, ...]
    left: tuple[str, ...]
    seconds: float
    digest: str


def read_progress(folder: Path, steps: list[Step], after: str | None) -> Progress:
    """Return which steps are finished, from the first.

    after: what they build upon, a digest; None where that is not there.
    """
    names = tuple(step.name for step in steps)
    if after is None:
        return Progress((), names, 0.0, "")
    entries, digest, seconds = _read(folder)[0], after, 0.0
    for done, step in enumerate(steps):
        entry = entries.get(step.name, {})
        if _find_outputs(folder, step, entry, _key(step, digest)) is None:
            return Progress(names[:done], names[done:], seconds, digest)
        digest = _digest_of(entry)
        seconds += entry["seconds"]
    return Progress(names, (), seconds, digest)


def read_given(folder: Path) -> Given:
    """Return what was given to `run_steps`; empty if it was never called."""
    return _read(folder)[1]


def run_steps(folder: Path, steps: list[Step], after: str, given: Given | None = None) -> str:
    """Do what is not finished; return the digest of all that the steps wrote.

    `given` is remembered for `read_given`; `after` is what it means for the steps.

    Raises:
        StudyError: the folder holds something else, or another process is at work in it.
    """
    _claim(folder)
    with _locked(folder):
        entries, digest = _read(folder)[0], after
        for step in steps:
            key, entry = _key(step, digest), entries.get(step.name, {})
            outputs = _find_outputs(folder, step, entry, key)
            if outputs is not None:
                entries[step.name] = entry | {"outputs": outputs}
            else:
                if entry.get("key") != key:
                    _remove(folder, step)
                entries[step.name] = {"key": key}
                _write(folder, entries, given or {})
                entries[step.name] |= _do(folder, step)
            _write(folder, entries, given or {})
            digest = _digest_of(entries[step.name])
    return digest


def digest_of(value: object) -> str:
    """Return the hash of a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def _do(folder: Path, step: Step) -> Entry:
    start = time.monotonic()
    step.do()
    outputs = hash_files(folder, step.outputs, known={})
    return {"seconds": round(time.monotonic() - start, 1), "outputs": outputs}


def _key(step: Step, before: str) -> str:
    return digest_of([step.name, step.inputs, before])


def _digest_of(entry: Entry) -> str:
    return digest_of([entry["key"], hashes_of(entry["outputs"])])


def _find_outputs(folder: Path, step: Step, entry: Entry, key: str) -> Records | None:
    """Return what a finished step wrote, as it lies there now; None if it is not finished."""
    if entry.get("key") != key or "outputs" not in entry:
        return None
    if not all((folder / name).exists() for name in step.outputs):
        return None
    outputs = hash_files(folder, step.outputs, entry["outputs"])
    return outputs if hashes_of(outputs) == hashes_of(entry["outputs"]) else None


def _claim(folder: Path) -> None:
    if (folder / FILE).is_file():
        return
    folder.mkdir(parents=True, exist_ok=True)
    # A process that was killed in its first write leaves .study.json.NUMBER.tmp.
    if any(not path.name.startswith(f".{FILE}.") for path in folder.iterdir()):
        raise StudyError(
            f"{folder} holds something that this study did not make; move it away, or name another "
            "output"
        )
    _write(folder, {}, {})


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    with (folder / _LOCK).open("w", encoding="utf-8") as lock:
        if not take_lock(lock.fileno()):
            raise StudyError(f"another process is at work in {folder}; wait for it")
        yield


def _remove(folder: Path, step: Step) -> None:
    for name in step.outputs:
        path = folder / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def _read(folder: Path) -> tuple[dict[str, Entry], Given]:
    try:
        content = json.loads((folder / FILE).read_text(encoding="utf-8"))
        entries: dict[str, Entry] = content["steps"]
        for entry in entries.values():
            if "outputs" in entry:
                entry["outputs"] = _records(entry["outputs"])
        return entries, {name: _records(each) for name, each in content.get("given", {}).items()}
    except FileNotFoundError:
        return {}, {}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise StudyError(
            f"{folder / FILE} cannot be read ({error}); remove {folder} to begin it anew"
        ) from error


def _records(content: dict[str, Any]) -> Records:
    return {
        name: (int(size), int(time), str(digest)) for name, (size, time, digest) in content.items()
    }


def _write(folder: Path, entries: dict[str, Entry], given: Given) -> None:
    content = {"format": _FORMAT, "given": given, "steps": entries}
    write_whole(folder / FILE, json.dumps(content, indent=1) + "\n")
