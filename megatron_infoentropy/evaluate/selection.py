"""Which documents of a dataset are scored, and how many tokens of each."""

import hashlib
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron_infoentropy.evaluate.dataset import TokenDataset
from megatron_infoentropy.evaluate.errors import EmptyDomainError


@dataclass(frozen=True)
class Selection:
    """The documents to score, in the order of their domain and index; int64 arrays [documents].

    `domain` and `document` name the document in the dataset, `length` the tokens scored of it,
    counted from its start, at least one. `complete[i]` says whether all of domain i is selected.
    """

    domain: NDArray[np.int64]
    document: NDArray[np.int64]
    length: NDArray[np.int64]
    complete: list[bool]

    def __len__(self) -> int:
        return len(self.domain)


def select_documents(dataset: TokenDataset, max_tokens: int | None = None) -> Selection:
    """Select every document, or with `max_tokens` a sample of that many tokens.

    The sample takes from each domain its share of the dataset, in a fixed shuffled order of
    documents, and cuts the last one short. It is the same for every model. Documents without a
    token (preprocessing keeps them, as Megatron does) have nothing to score and are left out.

    Raises:
        ValueError: max_tokens is too small to take one token of each domain.
        EmptyDomainError: a domain has no token at all.
    """
    total = sum(int(domain.lengths.sum()) for domain in dataset.domains)
    if max_tokens is not None and max_tokens < len(dataset.domains):
        raise ValueError(
            f"max_tokens must be at least one token for each of the {len(dataset.domains)} "
            f"domains, got {max_tokens}"
        )
    parts = []
    for index, domain in enumerate(dataset.domains):
        _require_tokens(domain.name, domain.lengths)
        budget = int(domain.lengths.sum())
        if max_tokens is not None and max_tokens < total:
            budget = max(1, budget * max_tokens // total)
        documents, lengths = _within(domain.lengths, budget)
        parts.append((np.full(len(documents), index, dtype=np.int64), documents, lengths))
    domains, documents, lengths = (np.concatenate(column) for column in zip(*parts, strict=True))
    complete = [
        int(lengths[domains == index].sum()) == int(domain.lengths.sum())
        for index, domain in enumerate(dataset.domains)
    ]
    return Selection(domains, documents, lengths, complete)


def places_sha256(
    dataset: TokenDataset, selection: Selection, band_of_token: NDArray[np.int8]
) -> str:
    """SHA-256 of the domains' names, of which documents are scored, and every token id's band."""
    digest = hashlib.sha256(band_of_token.tobytes())
    for domain in dataset.domains:
        digest.update(f"{len(domain.name)}:{domain.name}".encode())
    for place in (selection.domain, selection.document, selection.length):
        digest.update(place.astype("<i8").tobytes())
    return digest.hexdigest()


def document_sha256(tokens: NDArray[np.int64]) -> bytes:
    """32 bytes that stand for a document's tokens, whatever integers they are stored in."""
    return hashlib.sha256(tokens.astype("<i4").tobytes()).digest()


def _require_tokens(name: str, lengths: NDArray[np.int64]) -> None:
    if lengths.sum() == 0:
        raise EmptyDomainError(
            f"domain {name!r} has {len(lengths)} documents and no token, so it has no perplexity: "
            "leave it out when preprocessing"
        )


def _within(lengths: NDArray[np.int64], budget: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Documents and the tokens taken of each, `budget` tokens in all, in ascending order."""
    order = np.arange(len(lengths))
    if budget < lengths.sum():
        order = np.random.default_rng(0).permutation(len(lengths))
    before = np.cumsum(lengths[order]) - lengths[order]
    taken = np.clip(budget - before, 0, lengths[order])
    chosen = np.flatnonzero(taken)
    chosen = chosen[np.argsort(order[chosen])]
    return order[chosen], taken[chosen]
