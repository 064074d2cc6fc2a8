"""The sums over scored tokens, and the numbers that are reported of them.

Bins of entropy are of equal width, from 0 to ln(vocabulary), the largest entropy there is: 1024 of
them, of which the reported histogram joins 16 each. Sums are fp64.

Bands of the vocabulary say which tokens are frequent. Tokens are sorted by how often they occur in
the training data, most frequent first, equal counts by token id. Walking down that list, a token
lies in band b of 20 if the tokens before it cover at least 5 b % of all occurrences and less than 5
(b + 1) %. So the token that crosses a cut belongs to the more frequent side, every set of bands
covers its share of occurrences up to that one token, and tokens that never occur in training lie in
the last band. Bands add up to

    buckets   high, medium, low: 80, 15 and 5 % of the occurrences (bands 0-15, 16-18, 19)
    deciles   1 (most frequent) to 10, two bands each; one very frequent token may leave some empty

so that both come out of the same sums per document.
"""

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_infoentropy.evaluate.evaluation import DocumentSums

BANDS = 20
BUCKETS = ("high", "medium", "low")
DECILES = tuple(str(number) for number in range(1, 11))
BANDS_OF: dict[str, slice] = {
    "high": slice(0, 16),
    "medium": slice(16, 19),
    "low": slice(19, 20),
    **{name: slice(2 * index, 2 * index + 2) for index, name in enumerate(DECILES)},
}

RULE = (
    "tokens sorted by training frequency (ties by id); high, medium and low cover 80, 15 and 5 % "
    "of the training occurrences, a decile 10 %; the token that crosses a cut belongs to the more "
    "frequent side; tokens never seen in training are low and in decile 10"
)


def frequency_bands(counts: NDArray[np.int64]) -> NDArray[np.int8]:
    """Put every token id into a band by its training frequency.

    Args:
        counts: occurrences of every token id in the training data, int64 [vocabulary].

    Returns:
        Band of every token id, 0 (most frequent) to 19, int8 [vocabulary].

    Raises:
        ValueError: counts that are not one-dimensional, negative, or all zero.
    """
    if counts.ndim != 1 or counts.size == 0 or counts.min() < 0 or counts.sum() == 0:
        raise ValueError(
            "token counts must be one non-negative number per token id, not all zero; got an array "
            f"of shape {counts.shape} with sum {counts.sum()}: use the token_counts.npy that "
            "preprocessing wrote for the training split"
        )
    order = np.argsort(-counts, kind="stable")
    in_order = counts[order]
    before = np.cumsum(in_order) - in_order
    band = np.empty(counts.size, dtype=np.int8)
    # Integers, rounded up: `before < share * total`, exactly, also beyond what a float resolves.
    cuts = [-(-part * int(counts.sum()) // BANDS) for part in range(1, BANDS)]
    band[order] = np.searchsorted(np.array(cuts), before, side="right")
    return band


def read_token_counts(path: Path, vocab_size: int) -> NDArray[np.int64]:
    """Read the table that preprocessing wrote.

    Returns:
        Occurrences of every token id, int64 [domains, vocab_size].

    Raises:
        ValueError: there is no table, or one of another width than the vocabulary.
    """
    advice = "give the token_counts.npy that `infoentropy preprocess` wrote with the training data"
    try:
        table = np.load(path, allow_pickle=False)
    except FileNotFoundError as error:
        raise ValueError(f"no token counts in {path}: {advice}") from error
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(f"{path} holds no token counts ({error}): {advice}") from error
    if table.ndim not in (1, 2) or table.shape[-1] != vocab_size:
        raise ValueError(
            f"{path} holds token counts of shape {table.shape}, expected [domains, {vocab_size}] "
            "as the vocabulary: give the table of training data written with the same tokenizer"
        )
    counts: NDArray[np.int64] = table.reshape(-1, vocab_size).astype(np.int64)
    return counts


def describe_bands(
    names: Iterable[str], counts: NDArray[np.int64], band_of_token: NDArray[np.int8]
) -> dict[str, dict[str, Any]]:
    """Return every bucket's or decile's size: its token ids, and the share they cover."""
    total = int(counts.sum())
    sizes = {}
    for name in names:
        inside = np.isin(band_of_token, np.arange(BANDS)[BANDS_OF[name]])
        share = int(counts[inside].sum()) / total
        sizes[name] = {"vocabulary": int(inside.sum()), "training_share": share}
    return sizes


Rows = NDArray[np.bool_] | slice
_ALL = slice(None)


def measures(tokens: int, ce_sum: float, entropy_sum: float) -> dict[str, Any]:
    """Return the numbers reported for any set of tokens; None where the set is empty."""
    nats = ce_sum / tokens if tokens else None
    return {
        "tokens": tokens,
        "nats_per_token": nats,
        "perplexity": None if nats is None else perplexity(nats),
        "mean_entropy": entropy_sum / tokens if tokens else None,
    }


def perplexity(nats_per_token: float) -> float | None:
    """Return e to that power; None beyond what a number holds (709 nats)."""
    return math.exp(nats_per_token) if nats_per_token < 709 else None


def summarise_documents(documents: DocumentSums, domains: list[str]) -> dict[str, Any]:
    """Return total, buckets, deciles, domains with their buckets, uniform_average, worst_case."""
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
    """Return the mean over domains in shares of `weights` (any scale, 0 or more, not all 0)."""
    total = sum(weights[name] for name in nats)
    shares = {name: weights[name] / total for name in nats}
    mean = sum(share * nats[name] for name, share in shares.items())
    return _average(mean) | {"weights": shares}


def bits_per_byte(scores: Mapping[str, Any], text_bytes: int) -> float | None:
    """Return cross entropy in bits over the bytes of UTF-8 text that the tokens came from."""
    if not text_bytes:
        return None
    return float(scores["nats_per_token"] * scores["tokens"] / math.log(2) / text_bytes)


def _average(nats: float) -> dict[str, Any]:
    return {"nats_per_token": nats, "perplexity": perplexity(nats)}


def _sums(documents: DocumentSums, rows: Rows = _ALL, bands: slice = _ALL) -> dict[str, Any]:
    parts = (documents.tokens, documents.ce, documents.entropy)
    tokens, ce, entropy = (part[rows, bands].sum() for part in parts)
    return measures(int(tokens), float(ce), float(entropy))


HISTOGRAM_BINS = 64
FINE_BINS = 16 * HISTOGRAM_BINS
CONFIDENCE_BINS = 20
DIFFICULTY = ("easy", "medium", "hard")
DIFFICULTY_RULE = (
    "easy, medium and hard: about a third of the scored tokens each, by the entropy of this "
    f"model's own prediction, cut at the nearest of {FINE_BINS} equal bins; two models' own "
    "thirds hold different tokens, so only `infoentropy compare` sets them side by side"
)

Floats = NDArray[np.floating[Any]]


class Tally:
    """`by_entropy` [tokens, ce, entropy; bins], `by_confidence` [tokens, confidence, right; bins].

    Adding in the same order gives the same bits.
    """

    def __init__(self, vocab_size: int) -> None:
        self.edges = np.linspace(0.0, math.log(vocab_size), FINE_BINS + 1)
        self.by_entropy = np.zeros((3, FINE_BINS))
        self.by_confidence = np.zeros((3, CONFIDENCE_BINS))

    def add(self, ce: Floats, entropy: Floats, confidence: Floats, right: Floats) -> None:
        """Add tokens, each [tokens]; `right` is 1 where the most probable token was the target."""
        # Rounding may put an entropy a hair above ln V or below 0: the outer bins take it.
        place = np.searchsorted(self.edges[1:-1], entropy, side="right")
        self.by_entropy += _binned(place, FINE_BINS, ce, entropy)
        place = np.minimum((confidence * CONFIDENCE_BINS).astype(np.int64), CONFIDENCE_BINS - 1)
        self.by_confidence += _binned(place, CONFIDENCE_BINS, confidence, right)

    def histogram(self) -> dict[str, Any]:
        """Return tokens by predicted entropy, with each bin's mean cross entropy and entropy."""
        tokens, ce, entropy = self.by_entropy.reshape(3, HISTOGRAM_BINS, -1).sum(axis=2)
        return {
            "edges": self.edges[:: FINE_BINS // HISTOGRAM_BINS].tolist(),
            "tokens": tokens.astype(int).tolist(),
            "mean_ce": _means(ce, tokens),
            "mean_entropy": _means(entropy, tokens),
        }

    def difficulty(self) -> dict[str, Any]:
        """Return the model's own easy, medium and hard third of the tokens."""
        tokens = self.by_entropy[0]
        middle = np.cumsum(tokens) - tokens / 2  # a bin goes where most of its tokens belong
        third = np.minimum(3 * middle // max(tokens.sum(), 1), 2)
        buckets = {}
        for index, name in enumerate(DIFFICULTY):
            inside = third == index
            count, ce, entropy = self.by_entropy[:, inside].sum(axis=1)
            bins = np.flatnonzero(inside)
            ends = (bins[0], bins[-1] + 1) if bins.size else (0, 0)
            buckets[name] = measures(int(count), float(ce), float(entropy)) | {
                "entropy_from": float(self.edges[ends[0]]),
                "entropy_to": float(self.edges[ends[1]]),
            }
        return {"rule": DIFFICULTY_RULE, "buckets": buckets}

    def calibration(self) -> dict[str, Any]:
        """Return how often the most probable token is right, and how probable it is held to be."""
        tokens, confidence, right = self.by_confidence
        total = tokens.sum()
        fine, ce, entropy = self.by_entropy.reshape(3, HISTOGRAM_BINS, -1).sum(axis=2)
        return {
            "accuracy": float(right.sum() / total),
            "mean_confidence": float(confidence.sum() / total),
            "expected_error": float(np.abs(confidence - right).sum() / total),
            "edges": np.linspace(0, 1, CONFIDENCE_BINS + 1).tolist(),
            "tokens": tokens.astype(int).tolist(),
            "accuracy_in_bin": _means(right, tokens),
            "confidence_in_bin": _means(confidence, tokens),
            "entropy_error": float(np.abs(ce - entropy).sum() / fine.sum()),
        }


def _binned(place: NDArray[np.int64], bins: int, *columns: Floats) -> NDArray[np.float64]:
    counts = np.bincount(place, minlength=bins).astype(np.float64)
    sums = [np.bincount(place, weights=column, minlength=bins) for column in columns]
    return np.stack([counts, *sums])


def _means(total: NDArray[np.float64], tokens: NDArray[np.float64]) -> list[float | None]:
    pairs = zip(total, tokens, strict=True)
    return [float(value / count) if count else None for value, count in pairs]
