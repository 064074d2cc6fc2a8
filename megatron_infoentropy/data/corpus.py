"""A real corpus that every machine already has, in the Pile's own format.

The running Python's standard library gives two domains, as different as two domains of the Pile:

    Python docs     help topics, and the docstrings of each library file as one document
    Python source   the library's source files, filled up with its tests to the size asked for

train, validation and test are split by *file*, not by document: a file and its docstrings are in
the same split, so no domain leaks into another. Validation and test get up to 2 % of the bytes of
each domain.

The same Python gives the same bytes: order and split come from the SHA-256 of the names, and
neither times nor paths of the machine are in the text.
"""

import hashlib
import json
import sysconfig
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import zstandard

from megatron_infoentropy.data import standard_library
from megatron_infoentropy.data.folder import new_folder
from megatron_infoentropy.progress import progress

DOCS = "Python docs"
SOURCE = "Python source"
SPLITS = ("train", "validation", "test")
_HELD_OUT = 0.02  # of the bytes of a domain, once for validation and once for test
_ZSTD_LEVEL = 9


class Document(NamedTuple):
    """One text of the corpus and the domain it is told apart by."""

    domain: str
    text: str


class Size(NamedTuple):
    """Documents and UTF-8 bytes of their texts."""

    documents: int
    bytes: int


@dataclass(frozen=True)
class CorpusSummary:
    """The files by split, and what each holds by (split, domain)."""

    files: dict[str, Path]
    sizes: dict[tuple[str, str], Size]

    @property
    def bytes(self) -> int:
        """UTF-8 bytes of all texts."""
        return sum(size.bytes for size in self.sizes.values())


@dataclass(frozen=True)
class _Unit:
    """What must stay together in one split."""

    name: str
    documents: list[Document]

    @property
    def bytes(self) -> int:
        return sum(len(document.text.encode()) for document in self.documents)


def build_corpus(
    output: Path,
    *,
    megabytes: float = 20.0,
    library: Path | None = None,
    overwrite: bool = False,
) -> CorpusSummary:
    """Write train, validation and test `.jsonl.zst` of at most `megabytes` (10^6 bytes of text).

    `library` is the folder to read, by default the standard library of the running Python.

    Raises:
        ValueError: the library is there in small part only (less than a quarter of the size asked
            for), or `output` is not empty and may not be overwritten.
    """
    root = library or Path(sysconfig.get_path("stdlib"))
    names = tuple(f"{split}.jsonl.zst" for split in SPLITS)
    with new_folder(output, replaceable=names, overwrite=overwrite) as folder:
        units = _collect(root, int(megabytes * 1e6))
        found = sum(unit.bytes for unit in units)
        if found < megabytes * 1e6 / 4:
            raise ValueError(
                f"expected about {megabytes:g} MB of text in {root}, found {found / 1e6:.1f} MB; "
                "this Python comes without most of its library's sources: install them or use "
                "another Python"
            )
        splits = _split(units)
        for split in SPLITS:
            _write(folder / f"{split}.jsonl.zst", splits[split])
    return CorpusSummary(
        files={split: output / f"{split}.jsonl.zst" for split in SPLITS},
        sizes={
            (split, domain): _size(splits[split], domain)
            for split in SPLITS
            for domain in (DOCS, SOURCE)
        },
    )


def _collect(root: Path, limit: int) -> list[_Unit]:
    """Units in the order of their hashes, each text once, the tests last and only up to `limit`."""
    units = []
    seen: set[bytes] = set()
    left = limit
    with progress("build corpus", limit, "bytes") as advance:
        for unit in _units(root):
            fresh = _Unit(unit.name, _not_seen(unit.documents, seen))
            if fresh.bytes > left:
                break
            left -= fresh.bytes
            advance(fresh.bytes)
            if fresh.documents:
                units.append(fresh)
    return sorted(units, key=lambda unit: _digest(unit.name))


def _units(root: Path) -> Iterator[_Unit]:
    topics = standard_library.help_topics(root)
    for topic in sorted(topics, key=_digest):
        yield _Unit(topic, [Document(DOCS, topics[topic])])
    names = standard_library.source_names(root)
    for name in sorted(names, key=lambda name: (standard_library.is_test(name), _digest(name))):
        source = standard_library.read_source(root, name)
        if source is None or not source.strip():
            continue
        if standard_library.is_test(name):  # what tests say of themselves is no documentation
            yield _Unit(name, [Document(SOURCE, source)])
            continue
        docs = standard_library.documentation(name, source)
        documents = [Document(DOCS, docs)] if docs else []
        yield _Unit(name, [*documents, Document(SOURCE, source)])


def _not_seen(documents: Iterable[Document], seen: set[bytes]) -> list[Document]:
    fresh = []
    for document in documents:
        digest = _digest(document.text)
        if digest not in seen:
            seen.add(digest)
            fresh.append(document)
    return fresh


def _split(units: list[_Unit]) -> dict[str, list[Document]]:
    """Fill validation, then test, in the order of the units; what does not fit is for training."""
    room = {
        split: {domain: _HELD_OUT * total for domain, total in _domain_bytes(units).items()}
        for split in ("validation", "test")
    }
    splits: dict[str, list[Document]] = {split: [] for split in SPLITS}
    for unit in units:
        needed = _domain_bytes([unit])
        for split, left in room.items():
            if all(needed[domain] <= left[domain] for domain in needed):
                splits[split] += unit.documents
                left.update({domain: left[domain] - needed[domain] for domain in needed})
                break
        else:
            splits["train"] += unit.documents
    return splits


def _domain_bytes(units: Iterable[_Unit]) -> Counter[str]:
    sizes: Counter[str] = Counter()
    for unit in units:
        for domain, text in unit.documents:
            sizes[domain] += len(text.encode())
    return sizes


def _write(path: Path, documents: list[Document]) -> None:
    lines = (
        json.dumps({"text": text, "meta": {"pile_set_name": domain}}, ensure_ascii=False) + "\n"
        for domain, text in documents
    )
    compressor = zstandard.ZstdCompressor(level=_ZSTD_LEVEL, write_checksum=True)
    path.write_bytes(compressor.compress("".join(lines).encode()))


def _size(documents: list[Document], domain: str) -> Size:
    sizes = [len(text.encode()) for name, text in documents if name == domain]
    return Size(len(sizes), sum(sizes))


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()
