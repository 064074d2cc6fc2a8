"""Text files for the data tests: lines in the Pile's format, plain or compressed."""

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
