"""A folder that appears when it is whole, and whose making can be taken up again.

While it is made it is `.NAME.partial` beside its place, with a fingerprint of what it is made of.
After an interruption, the next attempt with the same fingerprint, by the same converter, finds the
files that were ready.
"""

import fcntl
import hashlib
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

_FINGERPRINT = ".made-of"


@contextmanager
def new_folder(output: Path, fingerprint: str) -> Iterator[Path]:
    """Yield a hidden folder that takes the place of `output` if the block succeeds.

    What is in it stays for the next attempt if the machine is at fault (no space, killed,
    interrupted), and goes if the input is.

    Raises:
        ValueError: another process is making the same folder.
    """
    partial = output.parent / f".{output.name}.partial"
    partial.mkdir(parents=True, exist_ok=True)
    with (partial / _FINGERPRINT).open("a+", encoding="utf-8") as mark:
        try:
            fcntl.flock(mark, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"another process is writing {output}; wait for it") from None
        _clear_unless_of(partial, f"{_converter()} {fingerprint}")
        try:
            yield partial
            (partial / _FINGERPRINT).unlink()
            _replace(output, partial)
        except (OSError, KeyboardInterrupt):
            raise
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise


def files_stand(paths: Iterable[Path]) -> list[tuple[str, int, int]]:
    """Return what tells files from changed ones: place, size, time of the last change in ns."""
    return [
        (str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns)
        for path in sorted(paths)
    ]


def partial_size(output: Path) -> int:
    """Return the bytes that an interrupted attempt has written."""
    partial = output.parent / f".{output.name}.partial"
    return sum(path.stat().st_size for path in partial.rglob("*") if path.is_file())


def require_place(output: Path, *, overwrite: bool, source: Path) -> None:
    """Look whether a folder may be made there.

    Raises:
        ValueError: something is there and must not be overwritten, or it is what is read.
    """
    if output.exists() and not overwrite:
        raise ValueError(f"{output} exists; remove it, name another output, or give --overwrite")
    if source.resolve().is_relative_to(output.resolve()):
        raise ValueError(f"{output} would take the place of {source}; name another output")


def require_space(output: Path, size: int) -> None:
    """Look for room for `size` bytes, those of an interrupted attempt included.

    Raises:
        ValueError: naming how much is needed and how much is free.
    """
    place = next(path for path in (output, *output.resolve().parents) if path.is_dir())
    free = shutil.disk_usage(place).free + partial_size(output)
    if free < size:
        raise ValueError(
            f"expected {size / 1e9:.2f} GB of free space for {output}, got {free / 1e9:.2f} GB; "
            "make room or name an output on another disk"
        )


def _converter() -> str:
    """A hash of this room's code: what it wrote before it was mended is not to be kept."""
    sources = sorted(Path(__file__).parent.glob("*.py"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()


def _clear_unless_of(partial: Path, fingerprint: str) -> None:
    mark = partial / _FINGERPRINT
    if mark.read_text(encoding="utf-8") == fingerprint:
        return
    for path in partial.iterdir():
        if path.name != _FINGERPRINT:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    mark.write_text(fingerprint, encoding="utf-8")


def _replace(output: Path, new: Path) -> None:
    old = output.parent / f".{output.name}.old"
    if output.exists():
        shutil.rmtree(old, ignore_errors=True)
        output.replace(old)
    new.replace(output)
    shutil.rmtree(old, ignore_errors=True)
