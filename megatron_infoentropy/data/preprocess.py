"""Text to Megatron datasets: one pass over `.jsonl(.zst)` files, one dataset per domain.

    files --read--> documents --group by domain--> batches --encode, in threads--> ids --> writers

The output is the same, byte by byte, for any number of workers. Ids are those of Megatron's own
tool: special tokens the tokenizer adds to a text are added, and a document without ids leaves a
boundary in the index but no end-of-document id.
"""

import re
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from megatron_infoentropy.data.encode import Encoded, encode_batches, read_batches
from megatron_infoentropy.data.folder import new_folder
from megatron_infoentropy.data.indexed import IndexedWriter, token_dtype
from megatron_infoentropy.data.jsonl import require_readable
from megatron_infoentropy.data.manifest import (
    MANIFEST,
    TOKEN_COUNTS,
    DomainFacts,
    Manifest,
    TokenizerFacts,
    load_manifest,
)
from megatron_infoentropy.data.tokenizer import LoadedTokenizer, load_tokenizer
from megatron_infoentropy.progress import progress


@dataclass(frozen=True)
class PreprocessSummary:
    """What was written: `documents` (of all domains), of them `empty_documents` without a token."""

    manifest: Manifest
    documents: int
    empty_documents: int
    tokens: int


@dataclass
class _Domain:
    """One dataset while it is being written, and its running sums."""

    writer: IndexedWriter
    counts: npt.NDArray[np.int64]  # [vocab_size]
    documents: int = 0
    empty_documents: int = 0
    bytes: int = 0

    def add(self, encoded: Encoded) -> None:
        self.writer.add(encoded.tokens, encoded.lengths)
        self.counts += np.bincount(encoded.tokens, minlength=self.counts.size)
        self.documents += encoded.lengths.size
        self.empty_documents += int((encoded.lengths == 0).sum())
        self.bytes += encoded.batch.bytes

    def facts(self) -> DomainFacts:
        tokens = int(self.counts.sum())
        return DomainFacts(self.writer.prefix.name, self.documents, tokens, self.bytes)


def preprocess(
    inputs: Sequence[Path],
    tokenizer: Path,
    output: Path,
    *,
    workers: int = 1,
    append_eod: bool = True,
    split_by: str | None = "meta.pile_set_name",
    overwrite: bool = False,
) -> PreprocessSummary:
    """Write `output/<slug>.bin/.idx` per domain, the token counts and the manifest.

    `tokenizer` is a Hugging Face tokenizer folder. `split_by` is the key that holds a record's
    domain, dots leading into objects; None makes one dataset, "all". `workers` is the number of
    encoding threads. `overwrite` replaces an earlier token dataset.

    Raises:
        BrokenLineError: a line that is no document, by file and number.
        ValueError: inputs, tokenizer or output that can not be used; two domains with one slug; a
            domain without a token. Whatever the error, `output` is left as it was.
    """
    _require_usable(inputs, workers)
    loaded = load_tokenizer(tokenizer)
    replaceable = ("*.bin", "*.idx", MANIFEST, TOKEN_COUNTS)
    with new_folder(output, replaceable=replaceable, overwrite=overwrite) as folder:
        domains = _write_domains(folder, inputs, loaded, workers, append_eod, split_by)
        _save_facts(folder, domains, loaded, append_eod)
    return PreprocessSummary(
        manifest=load_manifest(output),
        documents=sum(domain.documents for domain in domains.values()),
        empty_documents=sum(domain.empty_documents for domain in domains.values()),
        tokens=sum(int(domain.counts.sum()) for domain in domains.values()),
    )


def slug(domain: str) -> str:
    """The domain's file name: lower case, everything but letters and digits to `_`.

    Raises:
        ValueError: nothing but underscores would be left.
    """
    name = re.sub(r"\W", "_", domain.lower())
    if not name.strip("_"):
        raise ValueError(f"the domain {domain!r} has no letter or digit to name a file after")
    return name


def _require_usable(inputs: Sequence[Path], workers: int) -> None:
    if not inputs:
        raise ValueError("expected at least one input file, got none")
    for path in inputs:
        require_readable(path)
    if workers < 1:
        raise ValueError(f"workers must be at least 1, got {workers}")


def _write_domains(
    folder: Path,
    inputs: Sequence[Path],
    loaded: LoadedTokenizer,
    workers: int,
    append_eod: bool,
    split_by: str | None,
) -> dict[str, _Domain]:
    domains: dict[str, _Domain] = {}
    slugs: dict[str, str] = {}

    total = sum(path.stat().st_size for path in inputs)
    with ExitStack() as stack:
        advance = stack.enter_context(progress("preprocess", total, "bytes"))
        batches = read_batches(inputs, split_by, advance)
        for encoded in encode_batches(loaded, batches, append_eod=append_eod, workers=workers):
            name = encoded.batch.domain
            if name not in domains:
                prefix = folder / _unused_slug(name, slugs)
                writer = IndexedWriter(prefix, vocab_size=loaded.vocab_size)
                counts = np.zeros(loaded.vocab_size, dtype=np.int64)
                domains[name] = _Domain(stack.enter_context(writer), counts)
            domains[name].add(encoded)
    return dict(sorted(domains.items()))


def _unused_slug(domain: str, slugs: dict[str, str]) -> str:
    name = slug(domain)
    other = slugs.setdefault(name, domain)
    if other != domain:
        raise ValueError(
            f"the domains {other!r} and {domain!r} would both be written to {name}.bin; rename one"
        )
    return name


def _save_facts(
    folder: Path, domains: dict[str, _Domain], loaded: LoadedTokenizer, append_eod: bool
) -> None:
    if not domains:
        raise ValueError("the inputs hold no document; nothing to write")
    for name, domain in domains.items():
        if not domain.counts.any():
            raise ValueError(
                f"the {domain.documents} documents of {name!r} hold no token; Megatron can not "
                "open an empty dataset, so leave that domain out"
            )
    np.save(folder / TOKEN_COUNTS, np.stack([domain.counts for domain in domains.values()]))
    Manifest(
        folder=folder,
        tokenizer=TokenizerFacts(loaded.sha256, loaded.vocab_size, loaded.eod_id),
        dtype=token_dtype(loaded.vocab_size).name,
        append_eod=append_eod,
        domains={name: domain.facts() for name, domain in domains.items()},
    ).save()
