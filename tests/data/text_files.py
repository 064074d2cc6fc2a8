"""Files for the data tests: lines in the Pile's format, plain or compressed, and damage."""

import gzip
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import zstandard

WriteLines = Callable[[str, Sequence[str]], Path]


def line(text: str, domain: str = "A") -> str:
    return json.dumps({"text": text, "meta": {"pile_set_name": domain}})


def write(path: Path, lines: Sequence[str]) -> Path:
    content = "".join(f"{each}\n" for each in lines).encode("utf-8", "surrogatepass")
    if path.suffix == ".zst":
        content = zstandard.ZstdCompressor().compress(content)
    elif path.suffix == ".gz":
        content = gzip.compress(content)
    path.write_bytes(content)
    return path


def change(path: Path, offset: int, value: bytes) -> None:
    """Overwrite some bytes of a file."""
    raw = bytearray(path.read_bytes())
    raw[offset : offset + len(value)] = value
    path.write_bytes(raw)


def cut(path: Path, size: int) -> None:
    """Keep the beginning of a file."""
    path.write_bytes(path.read_bytes()[:size])
