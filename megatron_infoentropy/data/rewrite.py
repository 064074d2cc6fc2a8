"""Datasets made of datasets: shards or datasets of one kind joined, documents cut into pieces.

Merging copies the files of ids, each part to its place in a file that has its full size from the
start, several parts at a time, and holds every span of a part to its checksum on the way; these are
the checksums of the whole. Shards joined in order are, byte for byte, what one run over all their
inputs would have written.

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
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Event, Lock

import numpy as np

from megatron_infoentropy.data.blocks import UnfitDocumentsError
from megatron_infoentropy.data.indexed import IndexedReader, Integers, bin_path, idx_path
from megatron_infoentropy.data.manifest import (
    MANIFEST,
    OUTPUT_FILES,
    REJECTED,
    DomainFacts,
    Manifest,
    Span,
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
from megatron_infoentropy.files import file_pieces, new_folder, require_space
from megatron_infoentropy.progress import Advance, progress


def merge(
    folders: Sequence[Path],
    output: Path,
    *,
    workers: int | None = None,
    allow_duplicates: bool = False,
    overwrite: bool = False,
) -> Manifest:
    """Write one dataset of several, in the order given, in `workers` threads.

    A folder that holds shards (`preprocess --shard`) stands for all of them. By default there is a
    thread a core.

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
    sizes = dict.fromkeys(prefixes, 0)
    for part in parts:
        for name, domain in part.domains.items():
            sizes[name] += domain.tokens * np.dtype(part.dtype).itemsize
    left_out: Counter[str] = Counter()
    for part in parts:
        left_out.update(part.left_out)
    require_space(output, sum(sizes.values()))
    with (
        new_folder(output, replaceable=OUTPUT_FILES, overwrite=overwrite) as folder,
        full_disk_is_said(folder.parent),
        TemporaryDirectory(dir=folder) as lengths,
        progress("merge", sum(sizes.values()), "bytes") as advance,
        _threads(workers) as (pool, stop),
    ):
        lists = [part.folder / REJECTED for part in parts if (part.folder / REJECTED).is_file()]
        if lists:
            (folder / REJECTED).write_bytes(b"".join(path.read_bytes() for path in lists))
        copier = _Copier(stop, advance)
        joins = {
            name: _Join(parts, name, folder / prefixes[name], Path(lengths), copier, pool)
            for name in sorted(prefixes, key=lambda name: -sizes[name])
        }
        domains = {name: joins[name].facts() for name in sorted(joins)}
        whole = replace(
            parts[0],
            folder=folder,
            engine=", ".join(sorted({name for part in parts for name in part.engine.split(", ")})),
            shard=None,
            shards_of="",
            inputs=tuple(facts for part in parts for facts in part.inputs),
            left_out=left_out,
        )
        seal(whole, domains, counts)
    return load_manifest(output)


@contextmanager
def _threads(workers: int) -> Iterator[tuple[Executor, Event]]:
    """Yield threads, and what tells them to stop; that is told whenever the block ends."""
    stop = Event()
    with ThreadPoolExecutor(workers) as pool:
        try:
            yield pool, stop
        finally:
            stop.set()
            pool.shutdown(wait=False, cancel_futures=True)


class _Copier:
    """Copies and hashes files until it is told to stop."""

    def __init__(self, stop: Event, advance: Advance) -> None:
        self._stop, self._advance, self._lock = stop, advance, Lock()

    def copy(self, source: Path, target: Path, offset: int, spans: Sequence[Span]) -> None:
        """Write a file of these spans into its place in a larger one.

        Raises:
            ValueError: a span is not what its checksum says.
        """
        start = 0
        with target.open("r+b", buffering=0) as file:
            file.seek(offset)
            for span in spans:
                digest = hashlib.sha256()
                for piece in file_pieces(source, start, span.bytes):
                    if self._stop.is_set():
                        return
                    digest.update(piece)
                    write_all(file, piece)
                    with self._lock:
                        self._advance(len(piece))
                if digest.hexdigest() != span.sha256:
                    raise _not_as_recorded(source)
                start += span.bytes
            os.fsync(file.fileno())


def _not_as_recorded(path: Path) -> ValueError:
    return ValueError(
        f"{path} is not what its manifest says (checksum, size or type); look with "
        "`infoentropy verify`, or preprocess that part again"
    )


class _Join:
    """One domain that is being written: every part's ids to their place, and an index of all."""

    def __init__(
        self,
        parts: Sequence[Manifest],
        name: str,
        prefix: Path,
        side: Path,
        copier: _Copier,
        pool: Executor,
    ) -> None:
        having = [part for part in parts if name in part.domains]
        self._facts = [part.domains[name] for part in having]
        self._parts = [part.prefix(name) for part in having]
        self._prefix, self._dtype = prefix, np.dtype(parts[0].dtype)
        self._lengths = side / prefix.name
        for facts, reader in zip(self._facts, self._readers(), strict=True):
            if (reader.tokens.size, reader.dtype) != (facts.tokens, self._dtype):
                raise _not_as_recorded(bin_path(reader.prefix))
        sizes = [facts.tokens * self._dtype.itemsize for facts in self._facts]
        with bin_path(prefix).open("wb") as file:
            file.truncate(sum(sizes))
        offsets = accumulate(sizes, initial=0)
        self._copies = [
            pool.submit(copier.copy, bin_path(part), bin_path(prefix), offset, facts.bin_spans)
            for facts, part, offset in zip(self._facts, self._parts, offsets, strict=False)
        ]
        self._index = pool.submit(self._write_index)

    def _readers(self) -> Iterator[IndexedReader]:
        """Open one part after the other: a map keeps its file open, and parts may be thousands."""
        return map(IndexedReader, self._parts)

    def facts(self) -> DomainFacts:
        """Wait for all of it; return what it is.

        Raises:
            ValueError: a part is not what its manifest says.
        """
        for copy in self._copies:
            copy.result()
        done = self._index.result()
        for facts in self._facts:
            done.tokens += facts.tokens
            done.bytes += facts.bytes
            done.rejected += facts.rejected
            done.bin_spans += facts.bin_spans
        return done

    def _write_index(self) -> DomainFacts:
        facts = DomainFacts(self._prefix.name, 0, 0, 0)
        with self._lengths.open("wb", buffering=0) as file:
            for reader in self._readers():
                for _, lengths in reader.pieces():
                    write_all(file, lengths.astype("<i4").tobytes())
                    facts.documents += lengths.size
                    facts.empty += int((lengths == 0).sum())
        facts.idx_sha256 = write_index(idx_path(self._prefix), self._lengths, self._dtype)
        return facts


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
        wanted = [(index, number) for index in range(number)]
        if shards != wanted:
            missing = [str(i) for i in range(number) if (i, number) not in shards]
            others = [part.folder.name for part in parts if part.shard not in wanted]
            raise ValueError(
                f"expected the {number} shards of one dataset in order, each once; missing: "
                f"{', '.join(missing) or 'none'}, to be left out: {', '.join(others) or 'none'}"
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
    if part.domains:  # of spans nothing is seen where the same text was cut into other files
        lengths = frozenset(facts.idx_sha256 for facts in part.domains.values())
        yield (part.token_counts_sha256, lengths), "hold the same tokens"
    for facts in part.inputs:
        if facts.documents:
            yield facts.sha256, f"were both made of {facts.name}"


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
        packed = replace(source, folder=folder, options=options, append_eod=False, left_out={})
        try:
            finish(packed, writers)
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
