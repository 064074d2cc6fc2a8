"""Files and folders that appear whole or not at all, their checksums, and a checkout's commit.

A folder is written into a hidden sibling, which takes the final name with one rename. A run that
fails leaves nothing; a run that is killed leaves only the hidden one, which the next run finds:
`new_folder` starts anew, in a `work_folder` long work can go on where it was.
"""

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

# Bytes that stay in a core's cache while they are hashed and written. Smaller pieces are slower
# where threads write one file, as each write waits for those of the others.
_READ_AT_ONCE = 1 << 20


@contextmanager
def new_folder(output: Path, *, replaceable: Sequence[str], overwrite: bool) -> Iterator[Path]:
    """Yield a hidden folder to write into; it becomes `output` when the block ends well.

    `replaceable` are patterns for the names this kind of output consists of. With `overwrite`, an
    existing folder is replaced if all it holds matches them, so that a mistyped path deletes
    nothing else.

    Raises:
        ValueError: see `require_free`; or another run is writing it.
    """
    with work_folder(output) as work:
        partial = work / "new"
        try:
            require_free(output, replaceable, overwrite)  # here, where no other run can end
            shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed
            partial.mkdir()
            yield partial
            publish(partial, output)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
            if [path.name for path in work.iterdir()] == ["lock"]:  # and nothing of longer work
                shutil.rmtree(work)


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
            if not take_lock(lock):
                raise ValueError(
                    f"another run is writing {output}; wait for it or name another folder"
                )
            if os.fstat(lock).st_nlink:  # else its owner finished and removed it just now
                yield folder
                return
        finally:
            os.close(lock)


def take_lock(descriptor: int) -> bool:
    """Lock a file until this process ends, however it does; False where another process has it.

    A file system without locks, as Lustre may be mounted, gives it to everyone.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass
    return True


def require_free(output: Path, replaceable: Sequence[str], overwrite: bool) -> None:
    """Check that `output` can be made or replaced.

    Raises:
        ValueError: it is a file, a mount point, or a non-empty folder that may not be replaced.
    """
    if not output.exists():
        return
    if not output.is_dir():
        raise ValueError(f"the output must be a folder, but {output} is a file; name another one")
    if output.resolve().is_mount():
        raise ValueError(
            f"{output} is a mount point, whose place no finished folder can take: name one in it"
        )
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
    """Write a folder's names to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def write_atomically(path: Path) -> Iterator[Path]:
    """Yield a temporary path in the same folder, which becomes `path` if the block succeeds.

    The folder is made when it is not there. After an error `path` is as it was, after a power cut
    either that or the whole new file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
        sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def write_whole(path: Path, content: bytes | str, *, executable: bool = False) -> None:
    """Write a small file, text as UTF-8, so that nobody ever sees half of it."""
    with write_atomically(path) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)
        if executable:
            temporary.chmod(0o755)


def file_pieces(path: Path, start: int = 0, size: int = sys.maxsize) -> Iterator[memoryview]:
    """Yield `size` bytes of a file from `start` on, or up to its end, some at a time.

    What is yielded is only good until the next.
    """
    buffer = memoryview(bytearray(_READ_AT_ONCE))
    with path.open("rb", buffering=0) as file:
        file.seek(start)
        while size > 0 and (read := file.readinto(buffer[:size])):
            yield buffer[:read]
            size -= read


def file_sha256(path: Path, start: int = 0, size: int = sys.maxsize) -> str:
    """Return the SHA-256 of a file, or of `size` bytes of it from `start` on, in hexadecimal."""
    digest = hashlib.sha256()
    for piece in file_pieces(path, start, size):
        digest.update(piece)
    return digest.hexdigest()


def require_space(output: Path, size: int) -> None:
    """Check that the disk of `output` has room for `size` bytes.

    Raises:
        ValueError: naming how much is needed and how much is free.
    """
    place = next(path for path in (output, *output.resolve().parents) if path.is_dir())
    free = shutil.disk_usage(place).free
    if free < size:
        raise ValueError(
            f"expected {size / 1e9:.2f} GB of free space for {output}, got {free / 1e9:.2f} GB; "
            "make room or name an output on another disk"
        )


def git(folder: Path, *words: str) -> str | None:
    """Return what a git command prints of `folder`; None where there is no git, or it fails."""
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *words],
            capture_output=True,
            text=True,
            check=False,
            errors="replace",
        )
    except OSError:  # no git on this machine
        return None
    return done.stdout.strip() or None


def commit_of(folder: Path) -> str | None:
    """Return the short git commit of the checkout whose top is `folder`.

    "-dirty" stands behind it where tracked files differ, other than results: nothing that is
    measured depends on them, and a measurement adds to them. None where `folder` is no checkout,
    or lies in somebody else's.
    """
    if git(folder, "rev-parse", "--show-toplevel") != str(folder.resolve()):
        return None
    commit = git(folder, "rev-parse", "--short", "HEAD")
    changed = git(folder, "status", "--porcelain", "-uno", "--", ".", ":!tools/results")
    return f"{commit}-dirty" if commit and changed else commit
