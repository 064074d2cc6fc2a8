"""Output folders that appear whole or not at all.

Everything is written into a hidden sibling, `.NAME.<random>.partial`, which takes the final name
with one rename. A run that fails leaves nothing; a run that is killed leaves only the hidden one.
"""

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
    _require_free(output, replaceable, overwrite)
    output.parent.mkdir(parents=True, exist_ok=True)
    mark = secrets.token_hex(4)
    partial = output.with_name(f".{output.name}.{mark}.partial")
    partial.mkdir()
    try:
        yield partial
        _put_in_place(partial, output, output.with_name(f".{output.name}.{mark}.old"))
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _require_free(output: Path, replaceable: Sequence[str], overwrite: bool) -> None:
    if not output.exists():
        return
    if not output.is_dir():
        raise ValueError(f"the output must be a folder, but {output} is a file; name another one")
    names = sorted(entry.name for entry in output.iterdir())
    if names and not overwrite:
        raise ValueError(
            f"the output folder {output} is not empty (it holds {names[0]}); "
            "name another one, or allow overwriting"
        )
    foreign = [n for n in names if not any(Path(n).match(pattern) for pattern in replaceable)]
    if foreign:
        raise ValueError(
            f"refusing to replace {output}: it also holds {foreign[0]}, which is no output of this "
            "command; move that away or name another folder"
        )


def _put_in_place(partial: Path, output: Path, old: Path) -> None:
    if output.exists():
        output.rename(old)
    try:
        partial.rename(output)
    except OSError:
        if old.exists():
            old.rename(output)
        raise
    shutil.rmtree(old, ignore_errors=True)
