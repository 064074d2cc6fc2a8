"""Token-frequency buckets: which tokens of the vocabulary are frequent, middling or rare.

Rule. Tokens are sorted by how often they occur in the training data, most frequent first, equal
counts by token id. Walking down that list, a token is `high` while the tokens before it cover less
than 80 % of all occurrences, `medium` while they cover less than 95 %, and `low` after that. So the
token that crosses a cut belongs to the more frequent bucket, every bucket covers its share of
occurrences up to that one token, and tokens that never occur in training are `low`.
"""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_infoentropy.evaluate.errors import VocabularyMismatchError

BUCKETS = ("high", "medium", "low")
CUTS_PERCENT = (80, 95)  # of occurrences, before the first token of the next bucket

RULE = (
    "tokens sorted by training frequency (ties by id); high, medium and low cover 80, 15 and 5 % "
    "of the training occurrences; the token that crosses a cut belongs to the more frequent "
    "bucket; tokens never seen in training are low"
)


def frequency_buckets(counts: NDArray[np.int64]) -> NDArray[np.int8]:
    """Put every token id into a bucket by its training frequency.

    Args:
        counts: occurrences of every token id in the training data, int64 [vocabulary].

    Returns:
        Index into `BUCKETS` of every token id, int8 [vocabulary].

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
    bucket = np.empty(counts.size, dtype=np.int8)
    # Integers, rounded up: `before < share * total`, exactly, also beyond what a float resolves.
    cuts = [-(-percent * int(counts.sum()) // 100) for percent in CUTS_PERCENT]
    bucket[order] = np.searchsorted(np.array(cuts), before, side="right")
    return bucket


def read_token_counts(path: Path, vocab_size: int) -> NDArray[np.int64]:
    """Read the table that preprocessing wrote and add up its domains.

    Returns:
        Occurrences of every token id over all domains, int64 [vocab_size].

    Raises:
        VocabularyMismatchError: a table of another width than the vocabulary.
    """
    table = np.load(path, allow_pickle=False)
    if table.ndim not in (1, 2) or table.shape[-1] != vocab_size:
        raise VocabularyMismatchError(
            f"{path} holds token counts of shape {table.shape}, expected [domains, {vocab_size}] "
            "as the vocabulary: give the table of training data written with the same tokenizer"
        )
    counts: NDArray[np.int64] = table.reshape(-1, vocab_size).sum(axis=0, dtype=np.int64)
    return counts


def describe_buckets(
    counts: NDArray[np.int64], bucket_of_token: NDArray[np.int8]
) -> dict[str, dict[str, Any]]:
    """Size of every bucket: token ids in it and the share of training occurrences they cover."""
    total = int(counts.sum())
    return {
        name: {
            "vocabulary": int((bucket_of_token == index).sum()),
            "training_share": int(counts[bucket_of_token == index].sum()) / total,
        }
        for index, name in enumerate(BUCKETS)
    }
