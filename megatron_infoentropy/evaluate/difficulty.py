"""Easy, medium and hard tokens, the same ones for every evaluation that is compared.

A token's difficulty is an entropy, but whose? That of one of the models compared would bend the
comparison: its own uncertain tokens hold the ones it is needlessly uncertain about, where the other
is better for no other reason. So it is the mean entropy over all evaluations compared, which
favours none of them, or that of a reference model outside the comparison. The thirds have equal
numbers of tokens.
"""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from megatron_infoentropy.evaluate.evaluation import Evaluation
from megatron_infoentropy.evaluate.tally import DIFFICULTY

_BLOCK = 1 << 22  # tokens that are in memory at once
_BINS = 4096
_LARGEST = 16.0  # nats; ln of nine million

Scores = NDArray[np.float16]


def difficulty_sums(
    evaluations: list[Evaluation], references: list[Evaluation]
) -> tuple[NDArray[np.float64], NDArray[np.float64]] | None:
    """Per document and third: tokens [D, 3], and every evaluation's cross entropies [E, D, 3].

    None where an evaluation keeps no scores of its tokens. All must have scored the same tokens.
    """
    scores = [e.token_scores for e in evaluations if e.token_scores is not None]
    guides = [e.token_scores for e in references if e.token_scores is not None]
    if not guides or len(scores) < len(evaluations) or len(guides) < len(references):
        return None
    lengths = evaluations[0].documents.tokens.sum(axis=1)
    counts = np.zeros(_BINS)
    for tokens in _blocks(len(guides[0])):
        counts += np.bincount(_bins(guides, tokens), minlength=_BINS)
    third_of_bin = np.minimum(3 * (np.cumsum(counts) - counts / 2) // counts.sum(), 2).astype(int)
    ends = np.cumsum(lengths)
    cells = len(lengths) * len(DIFFICULTY)
    tokens_sum, ce = np.zeros(cells), np.zeros((len(scores), cells))
    for tokens in _blocks(len(guides[0])):
        document = np.searchsorted(ends, np.arange(tokens.start, tokens.stop), side="right")
        cell = document * len(DIFFICULTY) + third_of_bin[_bins(guides, tokens)]
        tokens_sum += np.bincount(cell, minlength=cells)
        for total, part in zip(ce, scores, strict=True):
            total += np.bincount(cell, weights=part[tokens, 0], minlength=cells)
    shape = len(lengths), len(DIFFICULTY)
    return tokens_sum.reshape(shape), ce.reshape(-1, *shape)


def _blocks(tokens: int) -> Iterator[slice]:
    for first in range(0, tokens, _BLOCK):
        yield slice(first, min(first + _BLOCK, tokens))


def _bins(guides: list[Scores], tokens: slice) -> NDArray[np.int64]:
    entropy = np.zeros(tokens.stop - tokens.start)
    for guide in guides:
        entropy += guide[tokens, 1]
    scale = _BINS / _LARGEST / len(guides)
    return np.clip((entropy * scale).astype(np.int64), 0, _BINS - 1)
