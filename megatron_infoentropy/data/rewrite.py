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
from collections.abc import Hashable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import replace
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

_ADDED_UP = ("documents", "tokens", "bytes", "empty", "rejected", "bin_spans")


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
    domains, counts = _domains(parts), _counts(parts)
    size = sum(facts.tokens for facts in domains.values()) * np.dtype(parts[0].dtype).itemsize
    require_space(output, size)
    with (
        new_folder(output, replaceable=OUTPUT_FILES, overwrite=overwrite) as folder,
        full_disk_is_said(folder.parent),
        progress("merge", size, "bytes") as advance,
    ):
        lists = [part.folder / REJECTED for part in parts if (part.folder / REJECTED).is_file()]
        if lists:
            (folder / REJECTED).write_bytes(b"".join(path.read_bytes() for path in lists))
        _write_domains(parts, domains, folder, workers, advance)
        whole = replace(
            parts[0],
            folder=folder,
            engine=", ".join(sorted({name for part in parts for name in part.engine.split(", ")})),
            shard=None,
            shards_of="",
            inputs=tuple(facts for part in parts for facts in part.inputs),
            left_out=sum((Counter(part.left_out) for part in parts), Counter()),
        )
        seal(whole, domains, counts)
    return load_manifest(output)


def _domains(parts: Sequence[Manifest]) -> dict[str, DomainFacts]:
    """Add up the parts' facts by domain; no two domains may have one file name."""
    names: dict[str, str] = {}
    domains: dict[str, DomainFacts] = {}
    for part in parts:
        for name, facts in part.domains.items():
            if names.setdefault(facts.prefix, name) != name:
                raise ValueError(
                    f"the domains {names[facts.prefix]!r} and {name!r} would both be written to "
                    f"{facts.prefix}.bin; rename one"
                )
            whole = domains.setdefault(name, DomainFacts(facts.prefix, 0, 0, 0))
            for what in _ADDED_UP:
                setattr(whole, what, getattr(whole, what) + getattr(facts, what))
    return domains


def _write_domains(
    parts: Sequence[Manifest],
    domains: Mapping[str, DomainFacts],
    folder: Path,
    workers: int,
    advance: Advance,
) -> None:
    """Write every domain's ids and index, the largest first, in threads.

    Raises:
        ValueError: a part is not what its manifest says; nothing is copied any more then.
    """
    itemsize = np.dtype(parts[0].dtype).itemsize
    stop, lock = Event(), Lock()

    def copy(source: Path, spans: Sequence[Span], target: Path, offset: int) -> None:
        """Write a part's file of these spans into its place in the larger one."""
        start = 0
        with target.open("r+b", buffering=0) as file:
            file.seek(offset)
            for span in spans:
                digest = hashlib.sha256()
                for piece in file_pieces(source, start, span.bytes):
                    if stop.is_set():
                        return
                    digest.update(piece)
                    write_all(file, piece)
                    with lock:
                        advance(len(piece))
                if digest.hexdigest() != span.sha256:
                    raise _not_as_recorded(source)
                start += span.bytes
            os.fsync(file.fileno())

    with ThreadPoolExecutor(workers) as pool:
        work: list[Future[None]] = []
        try:
            for name, facts in sorted(domains.items(), key=lambda item: -item[1].tokens):
                having = [part for part in parts if name in part.domains]
                work.append(pool.submit(_write_index, having, name, facts, folder / facts.prefix))
                target, offset = bin_path(folder / facts.prefix), 0
                with target.open("wb") as file:
                    file.truncate(facts.tokens * itemsize)
                for part in having:
                    its = part.domains[name]
                    source = bin_path(part.prefix(name))
                    work.append(pool.submit(copy, source, its.bin_spans, target, offset))
                    offset += its.tokens * itemsize
            for each in work:
                each.result()
        finally:
            stop.set()
            pool.shutdown(wait=False, cancel_futures=True)


def _not_as_recorded(path: Path) -> ValueError:
    return ValueError(
        f"{path} is not what its manifest says (checksum, size or type); look with "
        "`infoentropy verify`, or preprocess that part again"
    )


def _write_index(parts: Sequence[Manifest], name: str, whole: DomainFacts, prefix: Path) -> None:
    """Write the index of a domain's documents in all parts, and its checksum into the facts.

    The parts are opened one after the other: a map keeps its file open, and they may be thousands.
    """
    dtype, side = np.dtype(parts[0].dtype), prefix.with_name(f".{prefix.name}.lengths")
    with side.open("wb", buffering=0) as file:
        for part in parts:
            reader, facts = IndexedReader(part.prefix(name)), part.domains[name]
            size = (reader.dtype, reader.tokens.size, len(reader))
            if size != (dtype, facts.tokens, facts.documents):
                raise _not_as_recorded(bin_path(reader.prefix))
            for _, lengths in reader.pieces():
                write_all(file, lengths.astype("<i4").tobytes())
    whole.idx_sha256 = write_index(idx_path(prefix), side, dtype)
    side.unlink()


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

    total = sum(facts.tokens for facts in source.domains.values())
    with (
        new_folder(output, replaceable=OUTPUT_FILES, overwrite=overwrite) as folder,
        full_disk_is_said(folder.parent),
        TemporaryDirectory(dir=folder) as side,
        progress("pack", total, "tokens") as advance,
        ExitStack() as stack,
    ):
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
