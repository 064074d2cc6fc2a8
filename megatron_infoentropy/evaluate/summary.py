"""From sums per document to the numbers that are reported; plain arithmetic."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_infoentropy.evaluate.buckets import BANDS_OF, BUCKETS, DECILES
from megatron_infoentropy.evaluate.evaluation import DocumentSums

Rows = NDArray[np.bool_] | slice
_ALL = slice(None)


def measures(tokens: int, ce_sum: float, entropy_sum: float) -> dict[str, Any]:
    """The numbers reported for any set of tokens; None where the set is empty."""
    nats = ce_sum / tokens if tokens else None
    return {
        "tokens": tokens,
        "nats_per_token": nats,
        "perplexity": None if nats is None else perplexity(nats),
        "mean_entropy": entropy_sum / tokens if tokens else None,
    }


def perplexity(nats_per_token: float) -> float | None:
    """e to that power; None beyond what a number holds (709 nats)."""
    return math.exp(nats_per_token) if nats_per_token < 709 else None


def summarise_documents(documents: DocumentSums, domains: list[str]) -> dict[str, Any]:
    """total, buckets, deciles, domains (each with its buckets), uniform_average, worst_case."""
    by_domain = {}
    for index, name in enumerate(domains):
        rows = documents.domain == index
        buckets = {bucket: _sums(documents, rows, BANDS_OF[bucket]) for bucket in BUCKETS}
        size = {"documents": int(rows.sum())}
        by_domain[name] = _sums(documents, rows) | size | {"buckets": buckets}
    nats = {name: scores["nats_per_token"] for name, scores in by_domain.items()}
    mean, worst = sum(nats.values()) / len(nats), max(nats, key=lambda name: nats[name])
    return {
        "total": _sums(documents) | {"documents": len(documents.domain)},
        "buckets": {name: _sums(documents, _ALL, BANDS_OF[name]) for name in BUCKETS},
        "deciles": {name: _sums(documents, _ALL, BANDS_OF[name]) for name in DECILES},
        "domains": by_domain,
        "uniform_average": _average(mean),
        "worst_case": _average(nats[worst]) | {"domain": worst},
    }


def weighted_average(nats: Mapping[str, float], weights: Mapping[str, float]) -> dict[str, Any]:
    """The mean over domains in shares of `weights` (any scale, 0 or more, not all 0)."""
    total = sum(weights[name] for name in nats)
    shares = {name: weights[name] / total for name in nats}
    mean = sum(share * nats[name] for name, share in shares.items())
    return _average(mean) | {"weights": shares}


def bits_per_byte(scores: Mapping[str, Any], text_bytes: int) -> float | None:
    """Cross entropy in bits over the bytes of UTF-8 text that the tokens came from."""
    if not text_bytes:
        return None
    return float(scores["nats_per_token"] * scores["tokens"] / math.log(2) / text_bytes)


def _average(nats: float) -> dict[str, Any]:
    return {"nats_per_token": nats, "perplexity": perplexity(nats)}


def _sums(documents: DocumentSums, rows: Rows = _ALL, bands: slice = _ALL) -> dict[str, Any]:
    parts = (documents.tokens, documents.ce, documents.entropy)
    tokens, ce, entropy = (part[rows, bands].sum() for part in parts)
    return measures(int(tokens), float(ce), float(entropy))
