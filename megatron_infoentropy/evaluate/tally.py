"""Sums over scored tokens: by document and frequency bucket, and by predicted entropy."""

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_infoentropy.evaluate.buckets import BANDS

ENTROPY_BINS = 64  # of equal width, from 0 to ln(vocabulary), the largest entropy there is


class Tally:
    """Running sums in fp64: `tokens`, `ce`, `entropy` [documents, bands], `bin_*` [bins]."""

    def __init__(self, documents: int, vocab_size: int) -> None:
        shape = documents, BANDS
        self.tokens = np.zeros(shape, np.int64)
        self.ce = np.zeros(shape)
        self.entropy = np.zeros(shape)
        self.bin_edges = np.linspace(0.0, math.log(vocab_size), ENTROPY_BINS + 1)
        self.bin_tokens = np.zeros(ENTROPY_BINS, np.int64)
        self.bin_ce = np.zeros(ENTROPY_BINS)
        self.bin_entropy = np.zeros(ENTROPY_BINS)

    def add(
        self,
        document: NDArray[np.int64],
        band: NDArray[np.int8],
        ce: NDArray[np.float64],
        entropy: NDArray[np.float64],
    ) -> None:
        """Add tokens, each given by its document, its band and its two numbers in nats."""
        cell = document, band
        np.add.at(self.tokens, cell, 1)
        np.add.at(self.ce, cell, ce)
        np.add.at(self.entropy, cell, entropy)
        # Rounding may put an entropy a hair above ln V or below 0: the outer bins take it.
        position = np.searchsorted(self.bin_edges[1:-1], entropy, side="right")
        np.add.at(self.bin_tokens, position, 1)
        np.add.at(self.bin_ce, position, ce)
        np.add.at(self.bin_entropy, position, entropy)

    def histogram(self) -> dict[str, Any]:
        """Tokens by predicted entropy, with each bin's mean cross entropy and entropy in nats."""

        def means(total: NDArray[np.float64]) -> list[float | None]:
            pairs = zip(total, self.bin_tokens, strict=True)
            return [float(value / tokens) if tokens else None for value, tokens in pairs]

        return {
            "edges": self.bin_edges.tolist(),
            "tokens": self.bin_tokens.tolist(),
            "mean_ce": means(self.bin_ce),
            "mean_entropy": means(self.bin_entropy),
        }
