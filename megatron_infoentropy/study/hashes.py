"""SHA-256 of files, read again only where size or time of change are not those recorded.

A record is [size in bytes, mtime in ns, sha256], as `study.json` holds it.
"""

import hashlib
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

Record = tuple[int, int, str]
Records = dict[str, Record]  # by path below a folder
_THREADS = 8  # hashing lets them run side by side


def hash_files(folder: Path, names: tuple[str, ...], known: Mapping[str, Record]) -> Records:
    """Records of files, and of all files in folders; `known` is what was recorded of them."""
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
    """{path: sha256}: what counts, whenever the files were written."""
    return {name: digest for name, (_, _, digest) in records.items()}


def _record(path: Path, known: Record | None) -> Record:
    with path.open("rb") as file:
        found = os.fstat(file.fileno())  # before reading: what changes meanwhile is read again
        if known is not None and known[:2] == (found.st_size, found.st_mtime_ns):
            return known
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return found.st_size, found.st_mtime_ns, digest
