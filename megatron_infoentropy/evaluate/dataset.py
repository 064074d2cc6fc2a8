"""A preprocessed token dataset as the evaluation sees it: domains of documents of token ids."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megatron_infoentropy.data.indexed import IndexedReader, Integers, bin_path
from megatron_infoentropy.data.manifest import MANIFEST, load_manifest


@dataclass(frozen=True)
class Domain:
    """The documents of one domain; `lengths` int64 [documents], `bytes` of UTF-8 text.

    The first `skipped` tokens of every document, its start token, count as no part of it.
    """

    name: str
    reader: IndexedReader
    lengths: NDArray[np.int64]
    bytes: int
    skipped: int = 0

    def read(self, document: int, start: int, stop: int) -> Integers:
        """Token ids `start` to `stop` (excluded) of one document."""
        return self.reader[document][self.skipped + start : self.skipped + stop]


@dataclass(frozen=True)
class TokenDataset:
    """All domains of a dataset folder, and the tokenizer they were written with.

    A model reads the ids `context` in front of a document: the start token where the documents have
    one, else the end-of-document token.
    """

    domains: list[Domain]
    tokenizer_sha256: str
    vocab_size: int
    context: tuple[int, ...]
    state: str  # changes with the files: manifest, sizes and times
    empty_documents: int


def open_dataset(folder: Path, *, packed: bool = False) -> TokenDataset:
    """Open the dataset that preprocessing wrote into a folder.

    packed: documents will follow one another, as in training: then a start token follows the
    document before it, and is a token of the document like any other.

    Raises:
        ValueError: the manifest or a domain's .bin/.idx is missing, damaged or cut off.
    """
    manifest = load_manifest(folder)
    tokenizer = manifest.tokenizer
    start = () if packed or manifest.options.piece_tokens else tokenizer.start_ids
    domains = []
    for name, facts in manifest.domains.items():
        reader = IndexedReader(manifest.prefix(name))
        lengths = reader.lengths
        if (len(lengths), int(lengths.sum())) != (facts.documents, facts.tokens):
            raise ValueError(
                f"{manifest.prefix(name)}.bin holds {len(lengths)} documents and {lengths.sum()} "
                f"tokens, the manifest says {facts.documents} and {facts.tokens}: preprocess again"
            )
        lengths = np.maximum(lengths - len(start), 0)
        domains.append(Domain(name, reader, lengths, facts.bytes, len(start)))
    files = [folder / MANIFEST, *(bin_path(manifest.prefix(name)) for name in manifest.domains)]
    state = hashlib.sha256((folder / MANIFEST).read_bytes())
    for status in (path.stat() for path in files):
        state.update(f"{status.st_size} {status.st_mtime_ns} ".encode())
    empty = sum(int((domain.lengths == 0).sum()) for domain in domains)
    context = start or (tokenizer.eod_id,)
    return TokenDataset(
        domains, tokenizer.sha256, tokenizer.vocab_size, context, state.hexdigest(), empty
    )
