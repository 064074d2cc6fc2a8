"""Datasets made of datasets: shards or datasets of one kind joined, documents cut into pieces.

Merging reads and writes every byte of ids once, several domains at a time. Shards joined in order
are, byte for byte, what one run over all their inputs would have written.

Packing cuts a dataset into pieces of one length, as the published code does before it trains. Some
documents of a domain are laid end to end and cut; what is left of them at the end is dropped, and
the next ones start a new piece. Every piece becomes a document, so that Megatron, reading sequences
of the same length, shuffles whole pieces and never joins two of them.
"""

import hashlib
import os
from collections import Counter
from collections.abc import Hashable, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import replace
from io import FileIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from megatron_infoentropy.data.blocks import UnfitDocumentsError
from megatron_infoentropy.data.indexed import IndexedReader, Integers, bin_path, idx_path
from megatron_infoentropy.data.manifest import (
    MANIFEST,
    OUTPUT_FILES,
    REJECTED,
    DomainFacts,
    Manifest,
    load_manifest,
)
from megatron_infoentropy.data.writer import (
    Counts,
    DatasetWriter,
    finish,
    full_disk_is_said,
    seal,
    write_all,
    write_index,
)
from megatron_infoentropy.files import new_folder, require_space
from megatron_infoentropy.progress import Advance, progress

_COPIED_AT_ONCE = 1 << 23  # bytes


def merge(
    folders: Sequence[Path],
    output: Path,
    *,
    workers: int | None = None,
    allow_duplicates: bool = False,
    overwrite: bool = False,
) -> Manifest:
    """Write one dataset of several, in the order given, `workers` domains at a time.

    A folder that holds shards (`preprocess --shard`) stands for all of them. By default there is a
    worker a core.

    Raises:
        ValueError: a shard is missing; tokenizers, options or versions differ; two datasets are of
            one input and that is not allowed; a dataset is not what its manifest says; the disk is
            too small. `output` is then left as it was.
        DiskFull: something else filled the disk meanwhile; so it is then too.
    """
    parts = [load_manifest(folder) for given in folders for folder in _shards(given)]
    _require_same_kind(parts)
    if not allow_duplicates:
        _require_distinct(parts)
    workers = len(os.sched_getaffinity(0)) if workers is None else workers
    if workers < 1:
        raise ValueError(f"workers must be at least 1, got {workers}")
    prefixes, counts = _prefixes(parts), _counts(parts)
    sizes = {name: sum(_tokens(part, name) for part in parts) for name in prefixes}
    left_out: Counter[str] = Counter()
    for part in parts:
        left_out.update(part.left_out)
    require_space(output, sum(sizes.values()) * np.dtype(parts[0].dtype).itemsize)
    with (
        new_folder(output, replaceable=OUTPUT_FILES, overwrite=overwrite) as folder,
        full_disk_is_said(folder.parent),
        TemporaryDirectory(dir=folder) as lengths,
        progress("merge", sum(sizes.values()), "tokens") as advance,
        ThreadPoolExecutor(workers) as joins,
        ThreadPoolExecutor(2 * workers) as lanes,  # on an error it ends first, and with it joins
    ):
        lists = [part.folder / REJECTED for part in parts if (part.folder / REJECTED).is_file()]
        if lists:
            (folder / REJECTED).write_bytes(b"".join(path.read_bytes() for path in lists))
        tasks = {
            name: joins.submit(
                _join, parts, name, folder / prefixes[name], Path(lengths), lanes, advance
            )
            for name in sorted(prefixes, key=lambda name: -sizes[name])
        }
        domains = {name: tasks[name].result() for name in sorted(tasks)}
        for name in [name for name, facts in domains.items() if not facts.tokens]:
            left_out[name] += domains.pop(name).documents
        inputs = tuple(facts for part in parts for facts in part.inputs)
        whole = replace(parts[0], folder=folder, shard=None, shards_of="", inputs=inputs)
        seal(whole, domains, counts, dict(sorted(left_out.items())))
    return load_manifest(output)


def _tokens(part: Manifest, name: str) -> int:
    return part.domains[name].tokens if name in part.domains else 0


def _join(
    parts: Sequence[Manifest],
    name: str,
    prefix: Path,
    side: Path,
    lanes: Executor,
    advance: Advance,
) -> DomainFacts:
    """Write one domain: the ids of the parts in a row, and an index of all their documents.

    A domain without any token has no file.
    """
    facts, dtype = DomainFacts(prefix.name, 0, 0, 0), np.dtype(parts[0].dtype)
    whole, lengths = hashlib.sha256(), side / prefix.name
    with (
        bin_path(prefix).open("wb", buffering=0) as ids,
        lengths.open("wb", buffering=0) as numbers,
    ):
        for part in parts:
            if name not in part.domains:
                continue
            given, reader = part.domains[name], IndexedReader(part.prefix(name))
            wrong = "" if reader.dtype == dtype else f"its ids are {reader.dtype}"
            if reader.tokens.size != given.tokens:
                wrong = f"it has {reader.tokens.size} tokens"
            digest = _copy(bin_path(part.prefix(name)), ids, whole, lanes, advance, dtype.itemsize)
            if given.bin_sha256 not in ("", digest):
                wrong = "checksum"
            if wrong:
                raise ValueError(
                    f"{bin_path(part.prefix(name))} is not what its manifest says ({wrong}); look "
                    "with `infoentropy verify`, or preprocess that part again"
                )
            for _, some in reader.pieces():
                write_all(numbers, some.astype("<i4").tobytes())
                facts.documents += some.size
                facts.empty += int((some == 0).sum())
            facts.tokens += given.tokens
            facts.bytes += given.bytes
            facts.rejected += given.rejected
        os.fsync(ids.fileno())
    if facts.tokens:
        facts.bin_sha256 = whole.hexdigest()
        facts.idx_sha256 = write_index(idx_path(prefix), lengths, dtype)
    else:
        bin_path(prefix).unlink()
    return facts


def _copy(
    source: Path, target: FileIO, whole: Any, lanes: Executor, advance: Advance, itemsize: int
) -> str:
    """Append a file to another one; `whole` is the hash of that, the file's own is returned.

    The hash of all that is written cannot be cut into parts, so it is what takes longest: writing
    and the other hash are done at the same time, on the same bytes.
    """
    own = hashlib.sha256()
    with source.open("rb", buffering=0) as file:
        while piece := file.read(_COPIED_AT_ONCE):
            others = [lanes.submit(own.update, piece), lanes.submit(write_all, target, piece)]
            whole.update(piece)
            for each in others:
                each.result()
            advance(len(piece) // itemsize)
    return own.hexdigest()


def _counts(parts: Sequence[Manifest]) -> dict[str, Counts]:
    """Add up the parts' token counts by domain, which must be those of their manifests."""
    counts: dict[str, Counts] = {}
    for part in parts:
        path = part.folder / part.token_counts
        try:
            table = np.load(path)
        except (OSError, ValueError, EOFError) as error:
            raise ValueError(
                f"{path} can not be read: {error}; preprocess that part again"
            ) from error
        tokens = [facts.tokens for facts in part.domains.values()]
        is_whole = table.shape == (len(tokens), part.tokenizer.vocab_size)
        if not is_whole or table.sum(axis=1).tolist() != tokens:
            raise ValueError(f"{path} is not what its manifest says; preprocess that part again")
        for name, row in zip(part.domains, table, strict=True):
            counts[name] = counts[name] + row if name in counts else row
    return counts


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
        same = ("tokenizer", "dtype", "options", "versions")
        for what in (*same, "engine") if part.shard else same:
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

    with ExitStack() as stack:
        folder = stack.enter_context(
            new_folder(output, replaceable=OUTPUT_FILES, overwrite=overwrite)
        )
        stack.enter_context(full_disk_is_said(folder.parent))
        side = stack.enter_context(TemporaryDirectory(dir=folder))
        total = sum(facts.tokens for facts in source.domains.values())
        advance = stack.enter_context(progress("pack", total, "tokens"))
        writers: dict[str, DatasetWriter] = {}
        for name, facts in source.domains.items():
            writer = DatasetWriter(
                folder / facts.prefix,
                vocab_size=source.tokenizer.vocab_size,
                lengths=Path(side) / facts.prefix,
            )
            writers[name] = stack.enter_context(closing(writer))
            for pieces, read in _pieces(IndexedReader(source.prefix(name)), length, documents):
                writer.add(pieces, np.full(pieces.size // length, length))
                advance(read)
        options = replace(source.options, piece_tokens=length, piece_documents=documents)
        try:
            finish(replace(source, folder=folder, options=options, append_eod=False), writers)
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
