"""Files for the data tests: lines in the Pile's format, and damage; commands; and ids."""

import gzip
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import zstandard
from typer.testing import CliRunner, Result

from megatron_infoentropy.cli import app


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
    offset %= len(raw)  # a negative one counts from the end
    raw[offset : offset + len(value)] = value
    path.write_bytes(raw)


def cut(path: Path, size: int) -> None:
    """Keep the beginning of a file."""
    path.write_bytes(path.read_bytes()[:size])


def command(*words: object, given: str | None = None) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words], input=given)


def assert_ids(encoded: tuple[np.ndarray, np.ndarray], expected: list[list[int]]) -> None:
    """What an engine gave are these ids of each text."""
    tokens, lengths = encoded
    assert lengths.tolist() == [len(ids) for ids in expected]
    assert tokens.tolist() == [token for ids in expected for token in ids]
