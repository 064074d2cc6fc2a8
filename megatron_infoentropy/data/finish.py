"""The last step of writing a dataset folder: indexes, token counts, checksums, manifest."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from megatron_infoentropy.data.blocks import UnfitDocumentsError
from megatron_infoentropy.data.indexed import bin_path, idx_path
from megatron_infoentropy.data.journal import Counts, DomainTally
from megatron_infoentropy.data.manifest import TOKEN_COUNTS, DomainFacts, Manifest
from megatron_infoentropy.data.writer import DatasetWriter, file_sha256


@dataclass(frozen=True)
class Written:
    """One domain whose documents are all appended; `counts` int64 [vocab_size]."""

    writer: DatasetWriter
    tally: DomainTally
    counts: Counts


def finish(manifest: Manifest, written: Mapping[str, Written]) -> Manifest:
    """Complete the domains in the manifest's folder and save it with their facts.

    A domain without any token is left out, as Megatron can not open an empty dataset; in a shard it
    is kept, as other shards may have tokens for it. Can be repeated.

    Raises:
        UnfitDocumentsError: no domain has a token, and this is no shard.
    """
    domains: dict[str, DomainFacts] = {}
    left_out: dict[str, int] = {}
    for name, domain in sorted(written.items()):
        if domain.tally.tokens or manifest.shard:
            domains[name] = _facts(domain)
        else:
            left_out[name] = domain.tally.documents
            for path_of in (bin_path, idx_path):
                path_of(domain.writer.prefix).unlink(missing_ok=True)
    if not domains and not manifest.shard:
        raise UnfitDocumentsError("the inputs hold no document with a token; nothing to write")
    shape = (len(domains), manifest.tokenizer.vocab_size)
    table = np.array([written[name].counts for name in domains], dtype=np.int64).reshape(shape)
    checksum = _save_counts(manifest.folder / TOKEN_COUNTS, table)
    done = replace(manifest, domains=domains, left_out=left_out, token_counts_sha256=checksum)
    done.save()
    return done


def _facts(domain: Written) -> DomainFacts:
    checksums = domain.writer.finish()
    tally = domain.tally
    return DomainFacts(
        prefix=tally.prefix,
        documents=tally.documents,
        tokens=tally.tokens,
        bytes=tally.bytes,
        empty=tally.empty,
        rejected=tally.rejected,
        bin_sha256=checksums.bin,
        idx_sha256=checksums.idx,
    )


def _save_counts(path: Path, table: Counts) -> str:
    with path.open("wb") as file:
        np.save(file, table)
        file.flush()
        os.fsync(file.fileno())
    return file_sha256(path)
