"""Checks every byte of a dataset, and shows what it holds: lengths and documents."""

import os
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import accumulate, repeat
from pathlib import Path

import numpy as np
import numpy.typing as npt

from megatron_infoentropy.data.indexed import (
    IndexedReader,
    bin_path,
    idx_path,
    require_prefix,
    token_dtype,
)
from megatron_infoentropy.data.manifest import (
    MANIFEST,
    TOKEN_COUNTS,
    Manifest,
    Span,
    load_manifest,
)
from megatron_infoentropy.data.tokenizer import LoadedTokenizer, load_tokenizer
from megatron_infoentropy.files import file_sha256
from megatron_infoentropy.progress import progress

_SHOWN_TOKENS = 200  # of a document that is shown
_BAR = 40


def inspect(
    target: Path, *, tokenizer: Path | None = None, documents: Sequence[int] | None = None
) -> Iterator[str]:
    """Yield lines that show a dataset folder, or a single dataset by its prefix.

    Of each dataset: its counts, a histogram of the documents' lengths, and how the given
    `documents` begin (negative numbers count from the end; by default the first and the last), as
    text if there is a tokenizer folder.

    Raises:
        ValueError: there is no dataset, it is damaged, it has no such document, or a document has
            ids that the tokenizer does not.
    """
    loaded = None if tokenizer is None else load_tokenizer(tokenizer)
    prefixes = {target.name: target}
    if target.is_dir():
        manifest = load_manifest(target)
        prefixes = {name: manifest.prefix(name) for name in manifest.domains}
    else:
        require_prefix(target)
    for name, prefix in prefixes.items():
        reader = IndexedReader(prefix)
        yield from _lengths(name, reader.lengths)
        ends = [0, len(reader) - 1] if len(reader) else []
        for number in ends if documents is None else documents:
            if not -len(reader) <= number < len(reader):
                raise ValueError(f"{prefix} has documents 0 to {len(reader) - 1}, not {number}")
            ids = reader[number]
            first = ids[:_SHOWN_TOKENS].tolist()
            text = str(first) if loaded is None else _text(prefix, loaded, first)
            yield f"document {number % len(reader)}, {ids.size} tokens: {text!r}"


def _text(prefix: Path, loaded: LoadedTokenizer, ids: list[int]) -> str:
    for each in ids:
        if not 0 <= each < loaded.vocab_size:
            raise ValueError(
                f"{prefix} has the id {each}, the tokenizer has 0 to {loaded.vocab_size - 1}; name "
                "the one it was made with, or none to see ids"
            )
    return loaded.tokenizer.decode(ids, skip_special_tokens=False)


def _lengths(name: str, lengths: npt.NDArray[np.int64]) -> Iterator[str]:
    """Yield the counts of a dataset, and a bar for each power of two of its documents' lengths."""
    filled = lengths[lengths > 0]
    yield (
        f"{name}: {lengths.size} documents ({lengths.size - filled.size} empty), "
        f"{lengths.sum()} tokens, median {int(np.median(lengths)) if lengths.size else 0}, "
        f"longest {lengths.max(initial=0)}"
    )
    numbers = np.bincount(np.log2(filled).astype(np.int64))
    for power in range(int(np.flatnonzero(numbers).min(initial=numbers.size)), numbers.size):
        bar = "#" * int(_BAR * numbers[power] // numbers.max())
        yield f"{1 << power:>9} - {(2 << power) - 1:<9} {bar:<{_BAR}} {numbers[power]}"


@dataclass(frozen=True)
class Fault:
    """Something wrong with a file."""

    path: Path
    problem: str


def verify(
    target: Path,
    *,
    tokenizer: Path | None = None,
    inputs: Sequence[Path] = (),
) -> list[Fault]:
    """Check a dataset folder, or a single dataset by its prefix; an empty list means all is well.

    With `tokenizer`, a folder, it must be the one that the dataset was made with; of a single
    dataset, which does not say, the ids must be of its vocabulary. `inputs` must be the files that
    the dataset was made of, byte by byte, and all of them.

    Raises:
        ValueError: there is neither a manifest nor a dataset; a tokenizer that can not be read.
    """
    loaded = None if tokenizer is None else load_tokenizer(tokenizer)
    if not target.is_dir():
        require_prefix(target)
        if inputs:
            raise ValueError(f"{target} is one dataset: only the manifest of its folder has inputs")
        reader = _open(target)
        vocab_size = None if loaded is None else loaded.vocab_size
        return [reader] if isinstance(reader, Fault) else list(_check(reader, vocab_size, None))
    manifest = load_manifest(target)
    faults = []
    if loaded is not None and loaded.sha256 != manifest.tokenizer.sha256:
        problem = f"was made with another tokenizer than {tokenizer}"
        faults.append(Fault(target / MANIFEST, problem))
    if inputs:
        faults += _check_inputs(manifest, inputs)
    with progress("verify", len(manifest.domains), "domains") as advance:
        for name in manifest.domains:
            faults += _check_domain(manifest, name)
            advance(1)
    return [*faults, *_check_counts(manifest)]


def _check_inputs(manifest: Manifest, inputs: Sequence[Path]) -> Iterator[Fault]:
    """Compare inputs by name and content."""
    contents: dict[str, list[str]] = defaultdict(list)
    for facts in manifest.inputs:
        contents[facts.name].append(facts.sha256)
    with progress("verify inputs", sum(path.stat().st_size for path in inputs), "bytes") as advance:
        for path in inputs:
            checksum = file_sha256(path)
            if checksum in contents[path.name]:
                contents[path.name].remove(checksum)
            else:
                yield Fault(path, "is not what the dataset was made of")
            advance(path.stat().st_size)
    for name, missing in contents.items():
        if missing:
            problem = f"was made of {len(missing)} file(s) {name} of other content than those given"
            yield Fault(manifest.folder / MANIFEST, problem)


def _check_domain(manifest: Manifest, name: str) -> Iterator[Fault]:
    """Yield all that is wrong with one dataset of a folder; if it can not be opened, only that."""
    reader, facts = _open(manifest.prefix(name)), manifest.domains[name]
    if isinstance(reader, Fault):
        yield reader
        return
    starts = accumulate((span.bytes for span in facts.bin_spans), initial=0)
    parts = [(idx_path(reader.prefix), 0, Span(sys.maxsize, facts.idx_sha256))]
    parts += zip(repeat(bin_path(reader.prefix)), starts, facts.bin_spans, strict=False)
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        digests = pool.map(lambda part: file_sha256(part[0], part[1], part[2].bytes), parts)
        eod = manifest.tokenizer.eod_id if manifest.append_eod else None
        yield from _check(reader, manifest.tokenizer.vocab_size, eod)
        size = (len(reader), reader.tokens.size)
        if size != (facts.documents, facts.tokens):
            problem = f"has {size[0]} documents and {size[1]} tokens, the manifest says "
            yield Fault(idx_path(reader.prefix), f"{problem}{facts.documents} and {facts.tokens}")
        for (path, start, span), digest in zip(parts, digests, strict=True):
            if digest != span.sha256:
                problem = "does not have the checksum that the manifest says, from byte "
                yield Fault(path, f"{problem}{start} on")


def _check(reader: IndexedReader, vocab_size: int | None, eod: int | None) -> Iterator[Fault]:
    disorder = reader.disorder()
    if disorder:
        yield Fault(idx_path(reader.prefix), disorder)
    else:
        yield from _check_tokens(reader, vocab_size, eod)


def _open(prefix: Path) -> IndexedReader | Fault:
    try:
        return IndexedReader(prefix)
    except ValueError as error:
        problem = str(error)
    for path in (idx_path(prefix), bin_path(prefix)):
        if not path.is_file():
            return Fault(path, "is missing")
        if problem.startswith(f"{path} "):
            return Fault(path, problem.removeprefix(f"{path} "))
    return Fault(idx_path(prefix), problem)


def _check_tokens(
    reader: IndexedReader, vocab_size: int | None, eod: int | None
) -> Iterator[Fault]:
    path = bin_path(reader.prefix)
    if vocab_size is not None and reader.dtype != token_dtype(vocab_size):
        wanted = token_dtype(vocab_size).name
        yield Fault(
            idx_path(reader.prefix),
            f"says {reader.dtype.name}, ids of a vocabulary of {vocab_size} are {wanted}",
        )
        return
    largest, smallest, unended, first = -1, 0, 0, 0
    example = None
    for tokens, lengths in reader.pieces():
        if tokens.size:
            largest = max(largest, int(tokens.max()))
            smallest = min(smallest, int(tokens.min()))
        if eod is not None:
            filled = np.flatnonzero(lengths)
            wrong = filled[tokens[np.cumsum(lengths)[filled] - 1] != eod]
            unended += wrong.size
            if example is None and wrong.size:
                example = first + int(wrong[0])
        first += lengths.size
    if vocab_size is not None and (largest >= vocab_size or smallest < 0):
        yield Fault(path, f"has ids {smallest}..{largest}, the vocabulary is {vocab_size}")
    if unended:
        yield Fault(path, f"{unended} documents lack the end token {eod}, the first is {example}")


def _check_counts(manifest: Manifest) -> Iterator[Fault]:
    path = manifest.folder / TOKEN_COUNTS
    if not path.is_file():
        yield Fault(path, "is missing")
    elif file_sha256(path) != manifest.token_counts_sha256:
        yield Fault(path, "does not have the checksum that the manifest says")
