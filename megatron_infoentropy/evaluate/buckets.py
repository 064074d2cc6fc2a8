"""Which tokens of the vocabulary are frequent, middling or rare: bands, and what they add up to.

Rule. Tokens are sorted by how often they occur in the training data, most frequent first, equal
counts by token id. Walking down that list, a token lies in band b of 20 if the tokens before it
cover at least 5 b % of all occurrences and less than 5 (b + 1) %. So the token that crosses a cut
belongs to the more frequent side, every set of bands covers its share of occurrences up to that one
token, and tokens that never occur in training lie in the last band. Bands add up to

    buckets   high, medium, low: 80, 15 and 5 % of the occurrences (bands 0-15, 16-18, 19)
    deciles   1 (most frequent) to 10, two bands each; one very frequent token may leave some empty

so that both come out of the same sums per document.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

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
