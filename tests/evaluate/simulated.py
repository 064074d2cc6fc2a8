"""Evaluations drawn from a known truth: what documents, seeds and both together add to a model."""

from dataclasses import dataclass

import numpy as np

from megatron_infoentropy.evaluate.inference import Sums


@dataclass(frozen=True)
class World:
    """Standard deviations in nats per token; lengths of documents are very unequal."""

    documents: int = 80
    seeds: int = 3
    seed: float = 0.02  # of what a seed adds to all documents
    document: float = 0.1  # of what the objective adds to a document, for every seed
    both: float = 0.1  # of what a seed adds to a document
    columns: int = 1
    correlation: float = 0.0  # of the columns' effects
    lengths: float = 0.8  # deviation of the logarithm of a document's tokens
    baseline_seeds: int | None = None  # as many as `seeds`

    def draw(self, generator: np.random.Generator, effect: float = 0.0) -> Sums:
        """The first `seeds` evaluations are of one setting, the others of the baseline."""
        documents, columns, seeds = self.documents, self.columns, self.seeds
        every = seeds + (self.baseline_seeds or seeds)
        tokens = np.ceil(generator.lognormal(5, self.lengths, size=(documents, columns)))
        nats = np.broadcast_to(
            generator.normal(4, 1.5, size=(documents, 1)), (every, documents, columns)
        ).copy()
        nats += self._effects(generator, (every, 1, columns), self.seed)
        nats += self._effects(generator, (every, documents, columns), self.both)
        nats[:seeds] += effect + self._effects(generator, (documents, columns), self.document)
        return Sums(tokens, nats * tokens)

    def _effects(self, generator: np.random.Generator, shape: tuple, deviation: float):
        own = generator.normal(size=shape)
        shared = generator.normal(size=(*shape[:-1], 1))
        mixed = np.sqrt(self.correlation) * shared + np.sqrt(1 - self.correlation) * own
        return deviation * mixed

    def sides(self) -> tuple[list[int], list[int]]:
        every = self.seeds + (self.baseline_seeds or self.seeds)
        return list(range(self.seeds)), list(range(self.seeds, every))
