"""Text files for the data tests: lines in the Pile's format, plain or compressed."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import zstandard

WriteLines = Callable[[str, Sequence[str]], Path]


def line(text: str, domain: str = "A") -> str:
    return json.dumps({"text": text, "meta": {"pile_set_name": domain}})


def write(path: Path, lines: Sequence[str]) -> Path:
    content = "".join(f"{each}\n" for each in lines).encode("utf-8", "surrogatepass")
    compressed = zstandard.ZstdCompressor().compress(content)
    path.write_bytes(compressed if path.suffix == ".zst" else content)
    return path
