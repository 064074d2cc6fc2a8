"""A checkpoint's manifest: size and SHA-256 of every file, on the disk only after all of them.

It may hold sizes alone, with null for every SHA-256: those are known at once, a SHA-256 only when
the whole file was read, and a training that ends in between has a complete checkpoint.
"""

import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any

NAME = "infoentropy_manifest.json"
FORMAT = 1
THREADS = 8  # that read files; hashing lets them run side by side


def write_manifest(folder: Path, *, checksums: bool = True) -> int:
    """Write the manifest of what is in a checkpoint's folder; returns the bytes it vouches for.

    Every file is on the disk, not only in memory, when the manifest appears.

    checksums: read every file; otherwise the manifest holds sizes alone.

    Raises:
        OSError: a file cannot be read, or the manifest not be written.
    """
    paths = sorted(folder.rglob("*"))
    files = [path for path in paths if path.is_file() and not path.name.startswith(NAME)]
    with ThreadPoolExecutor(THREADS) as pool:
        made = pool.map(lambda path: _entry(path, checksums), files)
        entries = {
            path.relative_to(folder).as_posix(): entry
            for path, entry in zip(files, made, strict=True)
        }
    for directory in (folder.parent, folder, *filter(Path.is_dir, paths)):
        _sync(directory)
    write_whole(folder / NAME, json.dumps({"format": FORMAT, "files": entries}, indent=1) + "\n")
    return sum(entry["bytes"] for entry in entries.values())


def has_manifest(folder: Path) -> bool:
    return (folder / NAME).is_file()


def has_checksums(folder: Path) -> bool:
    """Whether a manifest that is not damaged holds more than sizes."""
    return all(digest is not None for _, digest in _read(folder / NAME).values())


def find_damage(folder: Path, *, checksums: bool = True, part: tuple[int, int] = (0, 1)) -> str:
    """What is wrong with a checkpoint that has a manifest, naming the file; "" for nothing.

    checksums: read every file whose SHA-256 is known; otherwise only sizes are compared.
    part: (rank, ranks): look at this share of the files; all shares together are all files.
    """
    try:
        entries = _read(folder / NAME)
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        return f"{folder / NAME} is damaged ({type(error).__name__}: {error})"
    rank, ranks = part
    mine = sorted(entries)[rank::ranks]
    with ThreadPoolExecutor(THREADS) as pool:
        found = pool.map(lambda name: _difference(folder / name, entries[name], checksums), mine)
        return next((difference for difference in found if difference), "")


def write_whole(path: Path, text: str) -> None:
    """Write a file that is either there as a whole, also after a power cut, or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    _sync(path.parent)


def _sync(folder: Path) -> None:
    opened = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def _entry(path: Path, checksums: bool) -> dict[str, Any]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest() if checksums else None
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
    reads = checksums and digest is not None
    try:
        with path.open("rb") as file:
            found = os.fstat(file.fileno()).st_size
            if found != size:
                return f"{path} has {found} bytes, not {size}"
            if reads and hashlib.file_digest(file, "sha256").hexdigest() != digest:
                return f"{path} has another SHA-256 than when it was saved"
    except OSError as error:
        return f"{path} cannot be read: {error.strerror}"
    return ""
