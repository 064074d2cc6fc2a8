"""Cuts a dataset into pieces of one length, as the published code does before it trains.

Some documents of a domain are laid end to end and cut; what is left of them at the end is dropped,
and the next ones start a new piece. Every piece becomes a document, so that Megatron, reading
sequences of the same length, shuffles whole pieces and never joins two of them.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from megatron_infoentropy.data.indexed import IndexedReader, Integers
from megatron_infoentropy.data.journal import DomainTally
from megatron_infoentropy.data.manifest import OUTPUT_FILES, Manifest, load_manifest
from megatron_infoentropy.data.writer import DatasetWriter, Written, finish
from megatron_infoentropy.files import new_folder
from megatron_infoentropy.progress import Advance, progress

_LENGTHS = "lengths"


@dataclass(frozen=True)
class Packed:
    """The packed dataset, and per domain how many of its tokens were dropped."""

    manifest: Manifest
    dropped: dict[str, int]


def pack(
    dataset: Path,
    output: Path,
    *,
    length: int = 1024,
    documents: int = 1000,
    overwrite: bool = False,
) -> Packed:
    """Write `dataset` as pieces of `length` tokens, each cut from `documents` documents in a row.

    The number of bytes of text in a piece is not known: the manifest says 0.

    Raises:
        ValueError: not a whole dataset that was written by `preprocess` or `merge`, is packed
            already, a size below 1, or no domain fills one piece. `output` is then left as it was.
    """
    if length < 1 or documents < 1:
        raise ValueError(f"length and documents must be at least 1, got {length} and {documents}")
    source = load_manifest(dataset)
    if source.shard is not None:
        raise ValueError(f"{dataset} is one shard: join them first, with `infoentropy merge`")
    if source.options.piece_tokens:
        raise ValueError(f"{dataset} is packed already; pack what it was made of")
    with new_folder(output, replaceable=OUTPUT_FILES, overwrite=overwrite) as folder:
        (folder / _LENGTHS).mkdir()
        total = sum(facts.tokens for facts in source.domains.values())
        with progress("pack", total, "tokens") as advance:
            written = {
                name: _pack_domain(source, name, folder, length, documents, advance)
                for name in source.domains
            }
        if not any(domain.tally.tokens for domain in written.values()):
            raise ValueError(
                f"no {documents} documents in a row of a domain have the {length} tokens of a "
                "piece; choose shorter pieces, or more documents"
            )
        options = replace(source.options, piece_tokens=length, piece_documents=documents)
        finish(replace(source, folder=folder, options=options, append_eod=False), written)
        for domain in written.values():
            domain.writer.close()
            (folder / _LENGTHS / domain.tally.prefix).unlink()
        (folder / _LENGTHS).rmdir()
    dropped = {
        name: facts.tokens - written[name].tally.tokens for name, facts in source.domains.items()
    }
    return Packed(load_manifest(output), dropped)


def _pack_domain(
    source: Manifest, name: str, folder: Path, length: int, documents: int, advance: Advance
) -> Written:
    prefix = source.domains[name].prefix
    vocab_size = source.tokenizer.vocab_size
    writer = DatasetWriter(
        folder / prefix, vocab_size=vocab_size, lengths=folder / _LENGTHS / prefix
    )
    counts = np.zeros(vocab_size, dtype=np.int64)
    reader = IndexedReader(source.prefix(name))
    for pieces, read in _pieces(reader, length, documents):
        writer.add(pieces, np.full(pieces.size // length, length))
        counts += np.bincount(pieces, minlength=vocab_size)
        advance(read)
    tally = DomainTally(prefix)
    tally.documents, tally.tokens = writer.size
    return Written(writer, tally, counts)


def _pieces(reader: IndexedReader, length: int, documents: int) -> Iterator[tuple[Integers, int]]:
    """Whole pieces, some in a row, as they come, and how many tokens were read for them."""
    left = np.empty(0, dtype=reader.dtype)
    missing = documents
    for tokens, lengths in reader.pieces():
        ends = np.append(0, np.cumsum(lengths))
        first = 0
        while first < lengths.size:
            last = min(first + missing, lengths.size)
            taken = np.concatenate((left, tokens[ends[first] : ends[last]]))
            whole = taken.size - taken.size % length
            yield taken[:whole], int(ends[last] - ends[first])
            missing -= last - first
            left, first = taken[whole:], last
            if missing == 0:
                left, missing = left[:0], documents
