"""Joins the shards of a dataset, or datasets of the same kind, domain by domain.

Every id is read once and written once. Shards joined in order are, byte for byte, what one run over
all their inputs would have written.
"""

import hashlib
from collections import Counter
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from megatron_infoentropy.data.indexed import IndexedReader, bin_path
from megatron_infoentropy.data.journal import DomainTally
from megatron_infoentropy.data.manifest import (
    MANIFEST,
    OUTPUT_FILES,
    REJECTED,
    Manifest,
    load_manifest,
)
from megatron_infoentropy.data.writer import DatasetWriter, Written, finish
from megatron_infoentropy.files import new_folder
from megatron_infoentropy.progress import Advance, progress

_LENGTHS = "lengths"


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
    prefixes = _prefixes(parts)
    with new_folder(output, replaceable=OUTPUT_FILES, overwrite=overwrite) as folder:
        (folder / _LENGTHS).mkdir()
        total = sum(facts.tokens for part in parts for facts in part.domains.values())
        with progress("merge", total, "tokens") as advance:
            written = {
                name: _join(name, prefix, folder, parts, advance)
                for name, prefix in prefixes.items()
            }
        _join_rejected(parts, folder)
        whole = replace(
            parts[0],
            folder=folder,
            shard=None,
            shards_of="",
            inputs=tuple(facts for part in parts for facts in part.inputs),
        )
        done = finish(whole, written)
        replace(done, left_out=done.left_out | _left_out(parts)).save()
        for domain in written.values():
            domain.writer.close()
            (folder / _LENGTHS / domain.tally.prefix).unlink()
        (folder / _LENGTHS).rmdir()
    return load_manifest(output)


def _shards(folder: Path) -> list[Path]:
    """The folder itself, or the shards in it, all of them."""
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
    """Documents that are there twice count twice, in training and in every test over documents."""
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
    """What no two parts may have in common, and how to say that they do."""
    yield part.folder.resolve(), "are the same folder"
    checksums = frozenset(facts.bin_sha256 for facts in part.domains.values())
    if checksums and "" not in checksums:
        yield checksums, "hold the same tokens"
    for facts in part.inputs:
        if facts.documents:
            yield facts.sha256 or facts, f"were both made of {facts.name}"


def _prefixes(parts: Sequence[Manifest]) -> dict[str, str]:
    """The file name of each domain."""
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


def _join(
    name: str, prefix: str, folder: Path, parts: Sequence[Manifest], advance: Advance
) -> Written:
    vocab_size = parts[0].tokenizer.vocab_size
    lengths = folder / _LENGTHS / prefix
    writer = DatasetWriter(folder / prefix, vocab_size=vocab_size, lengths=lengths)
    tally = DomainTally(prefix)
    counts = np.zeros(vocab_size, dtype=np.int64)
    for part in parts:
        if name not in part.domains:
            continue
        facts = part.domains[name]
        digest = hashlib.sha256()
        for tokens, document_lengths in IndexedReader(part.prefix(name)).pieces():
            writer.add(tokens, document_lengths)
            digest.update(np.ascontiguousarray(tokens).data)
            advance(tokens.size)
        if facts.bin_sha256 and digest.hexdigest() != facts.bin_sha256:
            raise ValueError(
                f"{bin_path(part.prefix(name))} is not what its manifest says (checksum); look "
                "with `infoentropy verify`, or preprocess that shard again"
            )
        counts += part.token_counts()[list(part.domains).index(name)]
        tally.bytes += facts.bytes
        tally.empty += facts.empty
        tally.rejected += facts.rejected
    tally.documents, tally.tokens = writer.size
    return Written(writer, tally, counts)


def _left_out(parts: Sequence[Manifest]) -> dict[str, int]:
    """Documents of the domains without a token in datasets that are no shards."""
    documents: Counter[str] = Counter()
    for part in parts:
        documents.update(part.left_out)
    return dict(documents)


def _join_rejected(parts: Sequence[Manifest], folder: Path) -> None:
    lists = [part.folder / REJECTED for part in parts if (part.folder / REJECTED).is_file()]
    if lists:
        (folder / REJECTED).write_bytes(b"".join(path.read_bytes() for path in lists))
