"""The sources that `--input` names: files, patterns, `datasets` folders, stores' objects, `-`.

The files are Paths. Those behind fsspec (`s3://bucket/name`, `hf://`, `gcs://`) and standard input
are Paths too, as far as reading goes: they have a name, and are opened and looked at.
"""

import glob
import io
import json
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

UNDATED = sys.maxsize  # when a file was written, where its store does not tell
_SPLIT = re.compile("(train|valid|validation|val|dev|test)([-_.].*)?")
_SPLITS = {"valid": "validation", "val": "validation", "dev": "validation"}


class InputStatus(NamedTuple):
    """The facts of an input that this package asks `Path.stat` for."""

    st_size: int
    st_mtime_ns: int
    st_ctime_ns: int
    st_dev: int
    st_ino: int


class RemoteFile(Path):
    """A file that fsspec opens. Where its store tells no times, its content alone identifies it.

    Raises:
        ValueError: by all it does, whatever the store's library raised.
    """

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self._url = url

    def __str__(self) -> str:
        return self._url

    def __reduce__(self) -> tuple[Any, ...]:
        return RemoteFile, (self._url,)

    def ask[T](self, question: Callable[[Any, str], T]) -> T:
        """Return what a function of the store and the path in it gives."""
        from fsspec.core import url_to_fs  # it comes with transformers, and a while is not needed

        try:
            return question(*url_to_fs(self._url))
        except ImportError as error:
            raise ValueError(f"{self} needs another package: {error}") from error
        except Exception as error:  # whatever the library behind it raises
            raise ValueError(
                f"{self} can not be read ({type(error).__name__}: {error}); look at the address, "
                "the network, and what the store's fsspec package asks for (credentials, usually)"
            ) from error

    def open(self, *_: Any, **__: Any) -> Any:
        """Open it for reading bytes."""
        return _RemoteReader(self, self.ask(lambda store, path: store.open(path, "rb")))

    def stat(self, **_: Any) -> Any:
        """Return its size and, as far as the store knows, when it was written."""
        return self.ask(_status)

    def is_file(self, **_: Any) -> bool:
        """Say whether there is such a file."""
        return self.ask(lambda store, path: bool(store.isfile(path)))

    def is_dir(self, **_: Any) -> bool:
        """Say whether it is a folder, as far as the store has any."""
        return self.ask(lambda store, path: bool(store.isdir(path)))

    def resolve(self, strict: bool = False) -> "RemoteFile":
        """Return the file itself: an address has no links."""
        return self


def _status(store: Any, path: str) -> InputStatus:
    store.invalidate_cache(path)
    try:
        written = int(store.modified(path).timestamp() * 1e9)
    except (NotImplementedError, KeyError, AttributeError):
        written = UNDATED
    size = store.size(path)
    if size is None:
        raise ValueError("its server tells no size; download it")
    return InputStatus(size, written, written, -1, hash((store, path)))


class _RemoteReader(io.RawIOBase):
    """An open file of a store."""

    def __init__(self, remote: RemoteFile, file: Any) -> None:
        self._remote, self._file = remote, file

    def readinto(self, buffer: Any) -> int:
        data = self._remote.ask(lambda *_: self._file.read(len(buffer)))
        buffer[: len(data)] = data
        return len(data)

    def seek(self, offset: int, whence: int = 0) -> int:
        return self._remote.ask(lambda *_: int(self._file.seek(offset, whence)))

    def tell(self) -> int:
        return int(self._file.tell())

    def readable(self) -> bool:
        return True

    def close(self) -> None:
        self._file.close()
        super().close()


class StandardInput(Path):
    """Lines of JSON on standard input, which can be read once."""

    def __init__(self) -> None:
        super().__init__("-")

    def open(self, *_: Any, **__: Any) -> Any:
        """Return what is there to be read."""
        return sys.stdin.buffer

    def stat(self, **_: Any) -> Any:
        """Return nothing that is known: it has no size, and is never what it was."""
        return InputStatus(0, 0, 0, -1, -1)

    def resolve(self, strict: bool = False) -> "StandardInput":
        """Return standard input itself."""
        return self


def find_inputs(given: Iterable[str]) -> list[Path]:
    """Return the files that are named, in the order given; the matches of a pattern are sorted.

    What is the name of a file is no pattern. A file that is not there is left to who opens it.

    Raises:
        ValueError: a folder or a store that can not be used, with what to do.
    """
    files: list[Path] = []
    for name in given:
        if name == "-":
            files.append(StandardInput())
        elif "://" in name:
            files += _remote(name)
        elif Path(name).is_dir():
            files += _files_of(Path(name))
        else:
            names = [] if Path(name).exists() else glob.glob(name, recursive=True)  # noqa: PTH207 takes absolute
            files += map(Path, sorted(names) or [name])
    return files


def _remote(name: str) -> list[Path]:
    def matches(store: Any, path: str) -> list[Path]:
        names = sorted(store.glob(path)) if glob.has_magic(path) and not store.exists(path) else []
        if store.protocol == ("file", "local"):  # links and times are those of the system
            return list(map(Path, names or [path]))
        return [RemoteFile(store.unstrip_protocol(each)) for each in names] or [RemoteFile(name)]

    return RemoteFile(name).ask(matches)


def _files_of(folder: Path) -> list[Path]:
    """Return the files of a folder that `datasets` saved, or that holds Parquet files."""
    if (folder / "dataset_dict.json").is_file():
        splits = _read(folder / "dataset_dict.json", "splits")
        raise ValueError(
            f"{folder} holds the splits {', '.join(map(str, splits))}: name one, such as "
            f"{folder / str(splits[0])}"
        )
    if (folder / "state.json").is_file():
        return [
            folder / str(file["filename"]) for file in _read(folder / "state.json", "_data_files")
        ]
    files = sorted(folder.rglob("*.parquet"))
    lines = next(folder.rglob("*.jsonl*"), None)
    if files and lines:
        raise ValueError(
            f"{folder} holds Parquet files and others of lines, such as {lines}: name what to read "
            f"by patterns, such as '{folder}/**/*.parquet'"
        )
    splits = sorted({split for file in files for split in _splits_of(file.relative_to(folder))})
    if len(splits) > 1:
        by_name = any(_splits_of(Path(file.name)) for file in files)
        pattern = "{}*.parquet" if by_name else "{}/**/*.parquet"
        raise ValueError(
            f"{folder} holds the splits {', '.join(splits)}: name the files of one, such as "
            f"'{folder}/**/{pattern.format(splits[0])}'"
        )
    return files or [folder]


def _splits_of(file: Path) -> set[str]:
    found = [match[1] for part in file.parts if (match := _SPLIT.fullmatch(part))]
    return {_SPLITS.get(split, split) for split in found}


def _read(path: Path, key: str) -> Any:
    try:
        listed = json.loads(path.read_text(encoding="utf-8"))[key]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no file of `datasets`: {error!r}; save it again") from error
    if not isinstance(listed, list) or not listed:
        raise ValueError(f"{path} lists nothing at {key}: save it again")
    return listed
