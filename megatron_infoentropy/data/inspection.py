"""A look into a dataset: how many documents of which lengths, and what some of them say."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_infoentropy.data.indexed import IndexedReader, require_prefix
from megatron_infoentropy.data.manifest import load_manifest
from megatron_infoentropy.data.tokenizer import load_tokenizer

_SHOWN_TOKENS = 200  # of a document that is shown
_BAR = 40


@dataclass(frozen=True)
class Lengths:
    """Documents by length: `bars` are (shortest, longest, documents) in powers of two,
    from that of the shortest on."""

    documents: int
    tokens: int
    empty: int
    median: int
    longest: int
    bars: tuple[tuple[int, int, int], ...]

    def picture(self) -> str:
        """The histogram as lines of text."""
        most = max((number for *_, number in self.bars), default=1)
        return "".join(
            f"{low:>9} - {high:<9} {'#' * (_BAR * number // most):<{_BAR}} {number}\n"
            for low, high, number in self.bars
        )


@dataclass(frozen=True)
class Sample:
    """One document: its number, its length and how it begins, decoded if a tokenizer was given."""

    document: int
    tokens: int
    beginning: str


def datasets(target: Path) -> dict[str, Path]:
    """Prefixes by domain of a folder, or the one of a prefix.

    Raises:
        ValueError: there is neither.
    """
    if target.is_dir():
        manifest = load_manifest(target)
        return {name: manifest.prefix(name) for name in manifest.domains}
    require_prefix(target)
    return {target.name: target}


def lengths(prefix: Path) -> Lengths:
    """Documents of one dataset by length.

    Raises:
        ValueError: the dataset is damaged.
    """
    found = IndexedReader(prefix).lengths
    filled = found[found > 0]
    powers = np.bincount(np.log2(np.maximum(filled, 1)).astype(np.int64))
    return Lengths(
        documents=found.size,
        tokens=int(found.sum()),
        empty=found.size - filled.size,
        median=int(np.median(found)) if found.size else 0,
        longest=int(found.max(initial=0)),
        bars=tuple(
            (1 << power, (2 << power) - 1, int(number))
            for power, number in enumerate(powers)
            if powers[: power + 1].any()
        ),
    )


def samples(prefix: Path, documents: Sequence[int], tokenizer: Path | None = None) -> list[Sample]:
    """Some documents, by number (from the end if negative).

    Raises:
        ValueError: the dataset is damaged, or has no such document.
    """
    reader = IndexedReader(prefix)
    loaded = None if tokenizer is None else load_tokenizer(tokenizer).tokenizer
    shown = []
    for number in documents:
        if not -len(reader) <= number < len(reader):
            raise ValueError(f"{prefix} has documents 0 to {len(reader) - 1}, not {number}")
        ids = reader[number]
        first = ids[:_SHOWN_TOKENS].tolist()
        text = str(first) if loaded is None else loaded.decode(first, skip_special_tokens=False)
        shown.append(Sample(number % len(reader), ids.size, text))
    return shown
