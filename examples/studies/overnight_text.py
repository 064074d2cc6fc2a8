"""The text of overnight.yaml: a corpus of Python, and prose that Debian packages ship.

    infoentropy corpus runs/python --megabytes 60
    mkdir -p runs/prose && cd runs/prose
    apt-get download dict-gcide dict-foldoc dict-jargon fortunes
    for package in *.deb; do dpkg-deb -x "$package" .; done && cd ../..
    python examples/studies/overnight_text.py --corpus runs/python --output runs/overnight-text \\
      --domain dictionary runs/prose/usr/share/dictd/gcide.dict.dz \\
      --domain computing runs/prose/usr/share/dictd/{foldoc,jargon}.dict.dz \\
      --domain quotations runs/prose/usr/share/games/fortunes/*

Files are cut at blank lines into documents of some 4 kB. One in 50 stretches of 16 documents is for
validation and one for the test, by the SHA-256 of their text. Nothing is installed, and the same
files give the same bytes.
"""

import argparse
import gzip
import hashlib
import json
import sys
from collections import Counter
from collections.abc import Iterator
from itertools import batched
from pathlib import Path

import zstandard

SPLITS = ("train", "validation", "test")
DOCUMENT_BYTES = 4000
STRETCH = 16  # documents that stay in one split, so that no entry is cut in two between splits
ONE_IN = 50
GZIP = b"\x1f\x8b"


def text_of(path: Path) -> str | None:
    """Return a file's text, unpacked; None where it is no text, as an index of fortunes."""
    data = path.read_bytes()
    data = gzip.decompress(data) if data.startswith(GZIP) else data
    return None if b"\0" in data else data.decode(errors="replace")


def documents(text: str) -> Iterator[str]:
    """Cut a text at blank lines, a document as soon as it is long enough."""
    kept: list[str] = []
    size = 0
    for paragraph in text.split("\n\n"):
        kept.append(paragraph)
        size += len(paragraph.encode()) + 2
        if size >= DOCUMENT_BYTES:
            yield "\n\n".join(kept)
            kept, size = [], 0
    if "".join(kept).strip():
        yield "\n\n".join(kept)


def split_of(stretch: tuple[str, ...]) -> str:
    """Return the split of some documents, by their text alone."""
    number = int.from_bytes(hashlib.sha256("".join(stretch).encode()).digest()[:8]) % ONE_IN
    return SPLITS[number + 1] if number < 2 else "train"


def add_domain(name: str, paths: list[Path], lines: dict[str, list[str]]) -> Counter[str]:
    """Add the documents of some files to the lines of each split; return the bytes in each."""
    sizes: Counter[str] = Counter()
    for path in sorted({path.resolve() for path in paths}):  # some are links to others
        for stretch in batched(documents(text_of(path) or ""), STRETCH):
            split = split_of(stretch)
            sizes[split] += len("".join(stretch).encode())
            for one in stretch:
                record = {"text": one, "meta": {"pile_set_name": name}}
                lines[split].append(json.dumps(record, ensure_ascii=False))
    return sizes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--corpus", type=Path, required=True, help="of `infoentropy corpus`")
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    parser.add_argument("--domain", nargs="+", action="append", help="NAME FILE...; repeatable")
    asked = parser.parse_args()
    lines: dict[str, list[str]] = {}
    for split in SPLITS:
        with (asked.corpus / f"{split}.jsonl.zst").open("rb") as file:
            data = zstandard.ZstdDecompressor().stream_reader(file).read()
        lines[split] = data.decode().split("\n")[:-1]
    for name, *files in asked.domain or ():
        sizes = add_domain(name, list(map(Path, files)), lines)
        if not all(sizes[split] for split in SPLITS):
            parser.error(f"--domain {name}: too little text for three splits in {files}")
        words = ", ".join(f"{split} {sizes[split] / 1e6:.2f} MB" for split in SPLITS)
        sys.stdout.write(f"{name}: {words}\n")
    asked.output.mkdir(parents=True, exist_ok=True)
    for split in SPLITS:
        text = "".join(f"{line}\n" for line in lines[split])
        compressed = zstandard.ZstdCompressor(write_checksum=True).compress(text.encode())
        (asked.output / f"{split}.jsonl.zst").write_bytes(compressed)


if __name__ == "__main__":
    main()
