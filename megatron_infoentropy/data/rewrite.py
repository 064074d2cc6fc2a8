"""Datasets made of datasets: shards or datasets of one kind joined, documents cut into pieces.

Merging reads and writes every id once. Shards joined in order are, byte for byte, what one run over
all their inputs would have written.

Packing cuts a dataset into pieces of one length, as the published code does before it trains. Some
documents of a domain are laid end to end and cut; what is left of them at the end is dropped, and
the next ones start a new piece. Every piece becomes a document, so that Megatron, reading sequences
of the same length, shuffles whole pieces and never joins two of them.
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from megatron_infoentropy.data.blocks import UnfitDocumentsError
from megatron_infoentropy.data.indexed import IndexedReader, Integers, bin_path
from megatron_infoentropy.data.manifest import (
    MANIFEST,
    OUTPUT_FILES,
    REJECTED,
    Manifest,
    load_manifest,
)
from megatron_infoentropy.data.writer import DatasetWriter, finish
from megatron_infoentropy.files import new_folder
from megatron_infoentropy.progress import Advance, progress

Fill = Callable[[str, DatasetWriter, Advance], None]


def merge(
    folders: Sequence[Path],
    output: Path,
    *,
    allow_duplicates: bool = False,
    overwrite: bool = False,
) -> Manifest:
    """Write one dataset of several, in the order given.

    A folder that holds shards (`preprocess --shard`) stands for all of them.

    Raises:
        ValueError: a shard is missing; tokenizers, options or versions differ; two datasets are of
            one input and that is not allowed; a dataset is not what its manifest says. `output` is
            then left as it was.
    """
    parts = [load_manifest(folder) for given in folders for folder in _shards(given)]
    _require_same_kind(parts)
    if not allow_duplicates:
        _require_distinct(parts)

    def join(name: str, writer: DatasetWriter, advance: Advance) -> None:
        for part in parts:
            if name in part.domains:
                _append(part, name, writer, advance)

    with new_folder(output, replaceable=OUTPUT_FILES, overwrite=overwrite) as folder:
        lists = [part.folder / REJECTED for part in parts if (part.folder / REJECTED).is_file()]
        if lists:
            (folder / REJECTED).write_bytes(b"".join(path.read_bytes() for path in lists))
        inputs = tuple(facts for part in parts for facts in part.inputs)
        whole = replace(parts[0], folder=folder, shard=None, shards_of="", inputs=inputs)
        total = sum(facts.tokens for part in parts for facts in part.domains.values())
        done = _write("merge", whole, _prefixes(parts), total, join)
        left_out = Counter(done.left_out)
        for part in parts:
            left_out.update(part.left_out)
        replace(done, left_out=dict(left_out)).save()
    return load_manifest(output)


def _write(
    verb: str, manifest: Manifest, prefixes: Mapping[str, str], total: int, fill: Fill
) -> Manifest:
    """Write the manifest's folder, each domain by `fill`; `total` are the tokens to be read."""
    with TemporaryDirectory(dir=manifest.folder) as lengths:
        writers = {
            name: DatasetWriter(
                manifest.folder / prefix,
                vocab_size=manifest.tokenizer.vocab_size,
                lengths=Path(lengths) / prefix,
            )
            for name, prefix in prefixes.items()
        }
        try:
            with progress(verb, total, "tokens") as advance:
                for name, writer in writers.items():
                    fill(name, writer, advance)
            return finish(manifest, writers)
        finally:
            for writer in writers.values():
                writer.close()


def _append(part: Manifest, name: str, writer: DatasetWriter, advance: Advance) -> None:
    """Append a domain of a dataset, whose checksum must be that of its manifest."""
    facts, digest = part.domains[name], hashlib.sha256()
    for tokens, lengths in IndexedReader(part.prefix(name)).pieces():
        writer.add(tokens, lengths)
        digest.update(np.ascontiguousarray(tokens).data)
        advance(tokens.size)
    if facts.bin_sha256 and digest.hexdigest() != facts.bin_sha256:
        raise ValueError(
            f"{bin_path(part.prefix(name))} is not what its manifest says (checksum); look "
            "with `infoentropy verify`, or preprocess that shard again"
        )
    writer.facts.bytes += facts.bytes
    writer.facts.rejected += facts.rejected


def _shards(folder: Path) -> list[Path]:
    """Return the folder itself, or the shards in it, all of them."""
    if (folder / MANIFEST).is_file() or not folder.is_dir():
        return [folder]
    return sorted(path for path in folder.glob("shard-*-of-*") if path.is_dir()) or [folder]


def _require_same_kind(parts: Sequence[Manifest]) -> None:
    if not parts:
        raise ValueError("expected at least one dataset to merge, got none")
    first = parts[0]
    for part in parts[1:]:
        if first.shard and part.shard and first.shards_of != part.shards_of:
            raise ValueError(
                f"{part.folder} and {first.folder} are shards of different lists of files, or of "
                "files that changed between them: make both again, of one list"
            )
        for what in ("tokenizer", "dtype", "options", "versions"):
            ours, theirs = getattr(first, what), getattr(part, what)
            if ours != theirs:
                raise ValueError(
                    f"{part.folder} can not be merged with {first.folder}: their {what} differ "
                    f"({theirs} and {ours}); preprocess one of them again"
                )
    shards = [part.shard for part in parts]
    if any(shard is not None for shard in shards):
        number = max(shard[1] for shard in shards if shard is not None)
        if shards != [(index, number) for index in range(number)]:
            missing = [i for i in range(number) if (i, number) not in shards]
            raise ValueError(
                f"expected the {number} shards of one dataset in order, each once; missing: "
                f"{', '.join(map(str, missing)) or 'none'}"
            )


def _require_distinct(parts: Sequence[Manifest]) -> None:
    """Refuse to count documents twice, in training and in every test over documents."""
    seen: dict[Hashable, Manifest] = {}
    for part in parts:
        for key, what in _identities(part):
            first = seen.setdefault(key, part)
            if first is not part:
                raise ValueError(
                    f"{first.folder} and {part.folder} {what}: documents would be in the output "
                    "twice; leave one out, or give --allow-duplicates if that is meant"
                )


def _identities(part: Manifest) -> Iterator[tuple[Hashable, str]]:
    """Yield what no two parts may have in common, and how to say that they do."""
    yield part.folder.resolve(), "are the same folder"
    checksums = frozenset(facts.bin_sha256 for facts in part.domains.values())
    if checksums and "" not in checksums:
        yield checksums, "hold the same tokens"
    for facts in part.inputs:
        if facts.documents:
            yield facts.sha256 or repr(facts), f"were both made of {facts.name}"


def _prefixes(parts: Sequence[Manifest]) -> dict[str, str]:
    """Return the file name of each domain."""
    names: dict[str, str] = {}
    for part in parts:
        for name, facts in part.domains.items():
            names.setdefault(facts.prefix, name)
            if names[facts.prefix] != name:
                raise ValueError(
                    f"the domains {names[facts.prefix]!r} and {name!r} would both be written to "
                    f"{facts.prefix}.bin; rename one"
                )
    return {name: prefix for prefix, name in names.items()}


def pack(
    dataset: Path,
    output: Path,
    *,
    length: int = 1024,
    documents: int = 1000,
    overwrite: bool = False,
) -> tuple[Manifest, dict[str, int]]:
    """Write `dataset` as pieces of `length` tokens, each cut from `documents` documents in a row.

    The number of bytes of text in a piece is not known: the manifest says 0.

    Returns:
        The packed dataset, and by domain how many of its tokens were dropped.

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

    def cut(name: str, writer: DatasetWriter, advance: Advance) -> None:
        for pieces, read in _pieces(IndexedReader(source.prefix(name)), length, documents):
            writer.add(pieces, np.full(pieces.size // length, length))
            advance(read)

    with new_folder(output, replaceable=OUTPUT_FILES, overwrite=overwrite) as folder:
        options = replace(source.options, piece_tokens=length, piece_documents=documents)
        packed = replace(source, folder=folder, options=options, append_eod=False)
        prefixes = {name: facts.prefix for name, facts in source.domains.items()}
        total = sum(facts.tokens for facts in source.domains.values())
        try:
            _write("pack", packed, prefixes, total, cut)
        except UnfitDocumentsError as error:
            raise ValueError(
                f"no {documents} documents in a row of a domain have the {length} tokens of a "
                "piece; choose shorter pieces, or more documents"
            ) from error
    done = load_manifest(output)
    dropped = {
        name: facts.tokens - (done.domains[name].tokens if name in done.domains else 0)
        for name, facts in source.domains.items()
    }
    return done, dropped


def _pieces(reader: IndexedReader, length: int, documents: int) -> Iterator[tuple[Integers, int]]:
    """Yield whole pieces, some in a row, and how many tokens were read for them."""
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
