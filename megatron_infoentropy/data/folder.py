"""Output folders that appear whole or not at all.

Everything is written into a hidden sibling, which takes the final name with one rename. A run that
fails leaves nothing; a run that is killed leaves only the hidden one. `work_folder` has a name that
the next run finds, so that long work can go on where it was; `new_folder` has a random one.
"""

import fcntl
import os
import secrets
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def new_folder(output: Path, *, replaceable: Sequence[str], overwrite: bool) -> Iterator[Path]:
    """Yield a hidden folder to write into; it becomes `output` when the block ends well.

    `replaceable` are patterns for the names this kind of output consists of. With `overwrite`, an
    existing folder is replaced if all it holds matches them, so that a mistyped path deletes
    nothing else.

    Raises:
        ValueError: `output` is a file, or a non-empty folder that may not be replaced.
    """
    output = output.resolve()
    require_free(output, replaceable, overwrite)
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = output.with_name(f".{output.name}.{secrets.token_hex(4)}.partial")
    partial.mkdir()
    try:
        yield partial
        publish(partial, output)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def work_folder(output: Path) -> Iterator[Path]:
    """Yield `.NAME.partial` beside `output`, which no other run uses meanwhile; it stays.

    Raises:
        ValueError: another run is writing this output.
    """
    output = output.resolve()
    folder = output.with_name(f".{output.name}.partial")
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(folder / "lock", os.O_CREAT | os.O_RDWR, 0o644)
        try:
            try:  # the system drops the lock with the process, however that ends
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ValueError(
                    f"another run is writing {output}; wait for it or name another folder"
                ) from None
            if os.fstat(lock).st_nlink:  # else its owner finished and removed it just now
                yield folder
                return
        finally:
            os.close(lock)


def require_free(output: Path, replaceable: Sequence[str], overwrite: bool) -> None:
    """Check that `output` can be made or replaced.

    Raises:
        ValueError: it is a file, or a non-empty folder that may not be replaced.
    """
    if not output.exists():
        return
    if not output.is_dir():
        raise ValueError(f"the output must be a folder, but {output} is a file; name another one")
    names = sorted(entry.name for entry in output.iterdir())
    if names and not overwrite:
        raise ValueError(
            f"the output folder {output} is not empty (it holds {names[0]}); "
            "name another one, or give --overwrite"
        )
    foreign = [n for n in names if not any(Path(n).match(pattern) for pattern in replaceable)]
    if foreign:
        raise ValueError(
            f"refusing to replace {output}: it also holds {foreign[0]}, which is no output of this "
            "command; move that away or name another folder"
        )


def publish(partial: Path, output: Path) -> None:
    """Give a finished folder its final name, in place of what is there."""
    output = output.resolve()
    old = output.with_name(f".{output.name}.old")
    sync_folder(partial)
    if output.exists():
        shutil.rmtree(old, ignore_errors=True)  # of a run that was killed here
        output.rename(old)
    try:
        partial.rename(output)
    except OSError:
        if old.exists():
            old.rename(output)
        raise
    sync_folder(output.parent)
    shutil.rmtree(old, ignore_errors=True)


def sync_folder(folder: Path) -> None:
    """Have a folder's names on the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_synced(path: Path, content: bytes) -> None:
    """Write a small file so that it is there whole or as it was before."""
    partial = path.with_name(f"{path.name}.partial")
    with partial.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    partial.rename(path)
    sync_folder(path.parent)
