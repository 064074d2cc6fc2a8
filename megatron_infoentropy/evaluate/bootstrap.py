"""Nats per token on documents drawn anew: what a choice of other documents would have changed.

Documents are drawn with replacement, all of them together, and every statistic of every evaluation
is computed from the same draws, so that whatever makes a document hard for all models cancels in
differences between them.
"""

from dataclasses import dataclass

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
