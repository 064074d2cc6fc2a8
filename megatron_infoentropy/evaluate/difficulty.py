"""Easy, medium and hard tokens, the same ones for every evaluation that is compared.

A token's difficulty is an entropy, but whose? That of one of the models compared would bend the
comparison: its own uncertain tokens hold the ones it is needlessly uncertain about, where the other
is better for no other reason. So it is the mean entropy over all settings compared, each the mean
of its seeds: it favours none of them, however many runs each has. Or it is that of a reference
model outside the comparison. The thirds are as equal in tokens as bins of 0.004 nats allow.
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
    evaluations: list[Evaluation], references: list[list[Evaluation]]
) -> tuple[NDArray[np.float64], NDArray[np.float64]] | None:
    """Per document and third: tokens [D, 3], and every evaluation's cross entropies [E, D, 3].

    references: the settings whose mean entropy is the difficulty, each a list of evaluations.
    None where an evaluation keeps no scores of its tokens. All must have scored the same tokens.
    """
    scores = [e.token_scores for e in evaluations if e.token_scores is not None]
    guides = [[e.token_scores for e in s if e.token_scores is not None] for s in references]
    kept, given = ([len(setting) for setting in sides] for sides in (guides, references))
    if not guides or len(scores) < len(evaluations) or kept != given:
        return None
    scored = len(scores[0])
    lengths = evaluations[0].documents.tokens.sum(axis=1)
    counts = np.zeros(_BINS)
    for tokens in _blocks(scored):
        counts += np.bincount(_bins(guides, tokens), minlength=_BINS)
    third_of_bin = np.minimum(3 * (np.cumsum(counts) - counts / 2) // counts.sum(), 2).astype(int)
    ends = np.cumsum(lengths)
    cells = len(lengths) * len(DIFFICULTY)
    tokens_sum, ce = np.zeros(cells), np.zeros((len(scores), cells))
    for tokens in _blocks(scored):
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


def _bins(guides: list[list[Scores]], tokens: slice) -> NDArray[np.int64]:
    """Of the mean over settings of the entropies' mean over a setting's evaluations."""
    entropy = np.zeros(tokens.stop - tokens.start)
    for setting in guides:
        total = np.zeros_like(entropy)
        for guide in setting:
            total += guide[tokens, 1]
        entropy += total / len(setting)
    scale = _BINS / _LARGEST / len(guides)
    return np.clip((entropy * scale).astype(np.int64), 0, _BINS - 1)
