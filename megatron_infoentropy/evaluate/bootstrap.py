"""How sure a difference between two evaluations is: the paired bootstrap over documents.

Both models scored the same tokens, so each document carries its own difference, in which whatever
makes a document hard for both cancels. Documents are drawn with replacement, all of them together,
and every statistic is recomputed from the same draws: nats per token of one model minus nats per
token of the other, over all tokens, per frequency bucket and per domain. The middle 95 % of the
redrawn differences is the interval. It answers "would other documents of this kind show the same?"
and says nothing about other seeds: training is not repeated by redrawing documents.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron_infoentropy.evaluate.buckets import BANDS_OF, BUCKETS
from megatron_infoentropy.evaluate.errors import DifferentDataError
from megatron_infoentropy.evaluate.evaluation import Evaluation

RESAMPLES = 4000
CONFIDENCE = 0.95
# With fewer documents the redrawn values are too few and too alike for an interval to mean much.
FEWEST_DOCUMENTS = 8
# Draws are made in blocks of about this many numbers, so that memory stays bounded (64 MiB).
_BLOCK = 1 << 23


@dataclass(frozen=True)
class Interval:
    """A difference in nats per token; negative where the first evaluation is better.

    `low` and `high` bound the middle 95 % of the redrawn differences; both are None where fewer
    than `FEWEST_DOCUMENTS` documents hold such tokens. `difference` is None where there are none.
    """

    difference: float | None
    low: float | None
    high: float | None
    documents: int

    @property
    def excludes_zero(self) -> bool:
        return self.low is not None and self.high is not None and not self.low <= 0 <= self.high


@dataclass(frozen=True)
class Differences:
    """Differences in nats per token over all tokens, by frequency bucket and by domain."""

    total: Interval
    buckets: dict[str, Interval]
    domains: dict[str, Interval]


def paired_differences(
    pairs: list[tuple[Evaluation, Evaluation]], *, resamples: int = RESAMPLES, seed: int = 0
) -> Differences:
    """Differences first minus second, with an interval over documents.

    Args:
        pairs: evaluations to subtract from each other; with several pairs (runs of several seeds)
            the mean of their differences, every pair redrawn with the same documents.
        resamples: how often the documents are redrawn.
        seed: of the draws; the same seed gives the same intervals.

    Raises:
        DifferentDataError: evaluations that did not score the same tokens in the same buckets.
        ValueError: no pairs, or fewer than 2000 resamples (the ends of the interval would wobble).
    """
    if not pairs or resamples < 2000:
        raise ValueError(
            f"expected at least one pair and 2000 resamples, got {len(pairs)} and {resamples}"
        )
    reference = pairs[0][0]
    _require_same_data(reference, pairs)
    tokens = _by_statistic(reference, reference.documents.tokens.astype(np.float64))
    gaps = sum(first.documents.ce - second.documents.ce for first, second in pairs) / len(pairs)
    gap = _by_statistic(reference, np.asarray(gaps))
    with np.errstate(invalid="ignore"):  # a statistic without tokens is 0/0, reported as None
        redrawn = _redraw(np.hstack([gap, tokens]), resamples, seed)
        redrawn = redrawn[:, : gap.shape[1]] / redrawn[:, gap.shape[1] :]
        observed = gap.sum(axis=0) / tokens.sum(axis=0)
    intervals = [
        _interval(observed[column], redrawn[:, column], int((tokens[:, column] > 0).sum()))
        for column in range(gap.shape[1])
    ]
    buckets = dict(zip(BUCKETS, intervals[1:], strict=False))
    domains = dict(zip(reference.domains, intervals[1 + len(BUCKETS) :], strict=True))
    return Differences(intervals[0], buckets, domains)


def _require_same_data(reference: Evaluation, pairs: list[tuple[Evaluation, Evaluation]]) -> None:
    for evaluation in (one for pair in pairs for one in pair):
        if evaluation.fingerprint != reference.fingerprint:
            raise DifferentDataError(
                "the evaluations scored different tokens (data fingerprints "
                f"{reference.fingerprint[:12]} and {evaluation.fingerprint[:12]}), so their "
                "documents cannot be paired: evaluate both on the same data with the same options"
            )


def _by_statistic(evaluation: Evaluation, sums: NDArray[np.float64]) -> NDArray[np.float64]:
    """Sums [documents, bands] as columns: all tokens, every bucket, every domain."""
    total = sums.sum(axis=1, keepdims=True)
    by_bucket = [sums[:, BANDS_OF[name]].sum(axis=1) for name in BUCKETS]
    in_domain = evaluation.documents.domain[:, None] == np.arange(len(evaluation.domains))
    return np.hstack([total, np.stack(by_bucket, axis=1), total * in_domain])


def _redraw(sums: NDArray[np.float64], resamples: int, seed: int) -> NDArray[np.float64]:
    """Column sums over documents drawn with replacement, float64 [resamples, columns]."""
    generator = np.random.default_rng(seed)
    documents = len(sums)
    block = max(1, _BLOCK // documents)
    blocks = []
    for first in range(0, resamples, block):
        rows = min(block, resamples - first)
        drawn = generator.integers(documents, size=(rows, documents))
        drawn += np.arange(rows)[:, None] * documents
        times = np.bincount(drawn.ravel(), minlength=rows * documents)
        blocks.append(times.reshape(rows, documents) @ sums)
    return np.concatenate(blocks)


def _interval(observed: float, redrawn: NDArray[np.float64], documents: int) -> Interval:
    if documents == 0:
        return Interval(None, None, None, 0)
    if documents < FEWEST_DOCUMENTS:
        return Interval(float(observed), None, None, documents)
    tail = (1 - CONFIDENCE) / 2
    low, high = np.nanquantile(redrawn, [tail, 1 - tail])
    return Interval(float(observed), float(low), float(high), documents)
