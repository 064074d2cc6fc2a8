"""How sure a difference between two settings is, over documents and over seeds.

A difference of nats per token varies with the documents that were scored and with the seeds that
were trained. Its variance is estimated in parts that add up (crossed analysis of variance):

    between     variance of the seeds' differences over their number S, with S - 1 degrees of
                freedom; none where there is one seed, and then nothing is said about other seeds
    documents   variance of the mean difference over redrawn documents (bootstrap), less what
                differs from seed to seed, which `between` holds already

Each part is itself uncertain, and with two or three seeds very much so. The difference less the
truth is distributed like Z sqrt(sum part * n / chi2_n), Z normal, n the part's degrees of freedom
(a generalised pivot; with one part it is Student's t), and that gives interval, p-value and power.

Two simpler ways fail in tests/evaluate/test_inference.py: redrawing two or three seeds like
documents gives intervals that are far too narrow, and one t distribution with Satterthwaite's
degrees of freedom finds three times as many false differences as it should once p-values are
corrected for their number, where a part came out small by chance.

Documents are drawn with replacement, all of them together, and every statistic of every evaluation
is computed from the same draws, so that whatever makes a document hard for all models cancels in
differences between them.
"""

import math
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 4000
_BLOCK = 1 << 23  # numbers a block of draws holds, so that memory stays bounded (64 MiB)


@dataclass(frozen=True)
class Sums:
    """Of D documents: `tokens` [D, C] that each of C statistics runs over, the same for all of E
    evaluations, and their summed cross entropies `ce` [E, D, C]."""

    tokens: NDArray[np.float64]
    ce: NDArray[np.float64]

    @property
    def documents(self) -> NDArray[np.int64]:
        """How many documents hold tokens of each statistic, [C]."""
        return np.asarray((self.tokens > 0).sum(axis=0))

    @property
    def effective_documents(self) -> NDArray[np.float64]:
        """As many documents of equal length would be as uncertain, [C]; 0 where there are none."""
        squares = np.square(self.tokens).sum(axis=0)
        whole = np.square(self.tokens.sum(axis=0))
        return np.asarray(np.divide(whole, squares, out=np.zeros_like(whole), where=squares > 0))

    def nats(self) -> NDArray[np.float64]:
        """Nats per token, [E, C]; NaN where there are no tokens."""
        with np.errstate(invalid="ignore"):
            return np.asarray(self.ce.sum(axis=1) / self.tokens.sum(axis=0))


def redrawn_nats(sums: Sums, *, resamples: int = RESAMPLES, seed: int = 0) -> NDArray[np.float64]:
    """Nats per token [resamples, E, C] on documents drawn with replacement."""
    generator = np.random.default_rng(seed)
    evaluations, documents, columns = sums.ce.shape
    table = np.concatenate([sums.tokens[None], sums.ce]).transpose(1, 0, 2).reshape(documents, -1)
    block = max(1, _BLOCK // documents)
    blocks = []
    for first in range(0, resamples, block):
        rows = min(block, resamples - first)
        drawn = generator.integers(documents, size=(rows, documents))
        drawn += np.arange(rows)[:, None] * documents
        times = np.bincount(drawn.ravel(), minlength=rows * documents)
        blocks.append(times.reshape(rows, documents).astype(np.float64) @ table)
    drawn_sums = np.concatenate(blocks).reshape(resamples, 1 + evaluations, columns)
    with np.errstate(invalid="ignore"):
        return np.asarray(drawn_sums[:, 1:] / drawn_sums[:, :1])


CONFIDENCE = 0.95
POWER = 0.8
# With fewer documents the redrawn values are too few and too alike to tell how they spread.
FEWEST_DOCUMENTS = 8
_DRAWS = 1 << 16

Floats = NDArray[np.float64]
Part = tuple[float, int]  # a variance, and the degrees of freedom it is known with


@dataclass(frozen=True)
class Estimate:
    """A difference in nats per token, negative where the first setting is better.

    Every field but `documents` is None where no document holds such tokens; all but `difference`
    where fewer than `FEWEST_DOCUMENTS` do.
    """

    difference: float | None
    documents: int
    standard_error: float | None = None
    low: float | None = None  # of the interval that covers the truth in 95 of 100 cases
    high: float | None = None
    p: float | None = None  # of a difference as large or larger if there is none
    parts: tuple[Part, ...] = field(default=(), repr=False)

    def detectable(self, tests: int = 1) -> float | None:
        """The smallest true difference that would be shown in 80 of 100 repetitions, in nats.

        tests: how many differences share the 5 % that may be shown by chance.
        """
        if not self.parts:
            return self.standard_error  # unknown, or 0
        reach = _pivot(self.parts)
        shown, power = np.quantile(reach, [1 - (1 - CONFIDENCE) / tests, 2 * POWER - 1])
        return float(shown + power)


def estimate_differences(
    sums: Sums,
    first: list[int],
    second: list[int],
    *,
    paired: bool,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> list[Estimate]:
    """Differences first minus second of every statistic.

    Args:
        sums: of all evaluations.
        first, second: which of them belong to each setting, one per seed.
        paired: the i-th of both share a seed, and what it does to both cancels.
        resamples: how often the documents are redrawn.
        seed: of the draws; the same one gives the same intervals.

    Raises:
        ValueError: no evaluations, pairs that are none, or too few resamples.
    """
    if resamples < 1000 or not first or not second or (paired and len(first) != len(second)):
        raise ValueError(
            f"expected evaluations of two settings, as many of both where they are paired, and at "
            f"least 1000 resamples; got {len(first)}, {len(second)} and {resamples}"
        )
    documents = len(sums.tokens)
    redrawn = redrawn_nats(sums, resamples=resamples, seed=seed)
    observed = sums.nats()
    parts = [_Part(observed[first], redrawn[:, first]), _Part(observed[second], redrawn[:, second])]
    if paired:
        gaps = _Part(parts[0].observed - parts[1].observed, parts[0].redrawn - parts[1].redrawn)
        difference, drawn, parts = gaps.observed.mean(0), gaps.redrawn.mean(1), [gaps]
    else:
        difference = parts[0].observed.mean(0) - parts[1].observed.mean(0)
        drawn = parts[0].redrawn.mean(1) - parts[1].redrawn.mean(1)
    unbiased = documents / max(documents - 1, 1)
    shared = unbiased * (_variance(drawn) - sum(part.interaction() for part in parts))
    over_documents = np.maximum(shared, 0) if _several(parts) else unbiased * _variance(drawn)
    between = [part.between() for part in parts]
    freedoms = [len(part.observed) - 1 for part in parts]
    counts, effective = sums.documents, sums.effective_documents
    return [
        _estimate(
            float(difference[c]),
            int(counts[c]),
            [(float(over_documents[c]), max(round(float(effective[c])) - 1, 1))]
            + [(float(b[c]), n) for b, n in zip(between, freedoms, strict=True) if n],
        )
        for c in range(len(counts))
    ]


@dataclass(frozen=True)
class _Part:
    """Numbers of several seeds: as observed [S, C] and as redrawn [resamples, S, C]."""

    observed: Floats
    redrawn: Floats

    def between(self) -> Floats:
        """Variance of the seeds' mean by what differs between them, [C]; 0 of one seed."""
        seeds, columns = self.observed.shape
        return self.observed.var(axis=0, ddof=1) / seeds if seeds > 1 else np.zeros(columns)

    def interaction(self) -> Floats:
        """The part of it that other documents would change, [C]."""
        seeds, columns = self.observed.shape
        if seeds == 1:
            return np.zeros(columns)
        own = self.redrawn - self.redrawn.mean(axis=1, keepdims=True)
        every = np.sum([_variance(own[:, s]) for s in range(seeds)], axis=0)
        return np.asarray(every / (seeds * (seeds - 1)))


def _several(parts: list[_Part]) -> bool:
    return any(len(part.observed) > 1 for part in parts)


def _variance(redrawn: Floats) -> Floats:
    """Over the draws; a draw without any such token says nothing."""
    with np.errstate(invalid="ignore"):
        known = ~np.isnan(redrawn)
        count = np.maximum(known.sum(axis=0), 2)
        mean = np.where(known, redrawn, 0).sum(axis=0) / count
        squares: Floats = np.where(known, np.square(redrawn - mean), 0).sum(axis=0) / (count - 1)
    return squares


def _estimate(difference: float, documents: int, parts: list[Part]) -> Estimate:
    if documents == 0:
        return Estimate(None, 0)
    if documents < FEWEST_DOCUMENTS:
        return Estimate(difference, documents)
    known = tuple(part for part in parts if part[0] > 0)
    if not known:
        p = 1.0 if difference == 0 else 0.0
        return Estimate(difference, documents, 0.0, difference, difference, p)
    reach = _pivot(known)
    error = math.sqrt(sum(variance for variance, _ in known))
    half = float(np.quantile(reach, CONFIDENCE))
    # The observed one counts as a draw: no p-value is 0.
    p = (1 + int((reach >= abs(difference)).sum())) / (1 + len(reach))
    return Estimate(difference, documents, error, difference - half, difference + half, p, known)


def _pivot(parts: tuple[Part, ...]) -> Floats:
    """Draws of how far the difference may lie from the truth, without sign."""
    variance = sum(
        part * _inverse_chi2(freedom, place) for place, (part, freedom) in enumerate(parts)
    )
    return np.asarray(_normal() * np.sqrt(variance))


@lru_cache(maxsize=32)
def _inverse_chi2(freedom: int, place: int) -> Floats:
    """n over draws of chi2_n; another `place`, other draws."""
    draws = np.random.default_rng([1, place]).chisquare(freedom, size=_DRAWS)
    return np.asarray(freedom / draws)


@lru_cache(maxsize=1)
def _normal() -> Floats:
    return np.abs(np.random.default_rng(0).standard_normal(_DRAWS))


def holm(p_values: list[float | None]) -> list[float | None]:
    """P-values adjusted by Holm's step-down rule; None stays None and counts for nothing.

    Calling everything below 5 % shown, the chance of a single false one among them is at most 5 %,
    however the tests depend on each other. (Buckets, deciles and domains run over the same tokens,
    and each claim is read on its own: that is why not Benjamini and Hochberg's rule, which only
    bounds the share of false claims.)
    """
    known = sorted((p, index) for index, p in enumerate(p_values) if p is not None)
    adjusted: list[float | None] = [None] * len(p_values)
    largest = 0.0
    for rank, (p, index) in enumerate(known):
        largest = max(largest, min(1.0, p * (len(known) - rank)))
        adjusted[index] = largest
    return adjusted
