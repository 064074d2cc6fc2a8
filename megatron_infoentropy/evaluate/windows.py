"""How texts are cut for scoring, so that every token is scored exactly once.

A text of n tokens x_0 ... x_(n-1) is prefixed with a context: the start token that its tokenizer
puts there, else the end-of-document token. The first window predicts up to L tokens, L being the
context length (fewer where the context has more tokens than one); every further window predicts the
next S <= L, the stride, and sees the L - S + 1 tokens before them. With S = L windows share no
predicted token and only one token of context; the smaller S, the more context, at L / S times the
work.

    L = 4, S = 4                            L = 4, S = 2
    eod x0 x1 x2 | x3 x4 ...    inputs      eod x0 x1 x2 | x1 x2 x3 x4 | x3 ...
    x0  x1 x2 x3 | x4 x5 ...    targets     x0  x1 x2 x3 | .. .. x4 x5 | .. .. x6 x7
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

IGNORED = -100  # a target that is not scored


@dataclass(frozen=True)
class Windows:
    """All windows of a set of texts; four int64 arrays of one length.

    `text` counts through the texts given, `start` is the position of the first predicted token in
    its text, `length` the number of predicted tokens, `context` how many tokens are seen before
    the first predicted one, those in front of the text included.
    """

    text: NDArray[np.int64]
    start: NDArray[np.int64]
    length: NDArray[np.int64]
    context: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.text)

    @property
    def positions(self) -> NDArray[np.int64]:
        """What the model reads of every window."""
        return self.context + self.length - 1


def cut_windows(
    text_lengths: NDArray[np.int64], context_length: int, stride: int, in_front: int = 1
) -> Windows:
    """Cut texts of the given lengths (tokens, all > 0); 1 <= stride <= context_length.

    in_front: tokens of context in front of every text, 1 to context_length.
    """
    longest_first = context_length - in_front + 1
    later = -(-np.maximum(text_lengths - longest_first, 0) // stride)
    text = np.repeat(np.arange(len(text_lengths)), 1 + later)
    first = np.cumsum(1 + later) - (1 + later)
    number = np.arange(len(text)) - first[text]
    start = np.where(number == 0, 0, longest_first + (number - 1) * stride)
    longest = np.where(number == 0, longest_first, stride)
    length = np.minimum(text_lengths[text] - start, longest)
    context = np.where(number == 0, in_front, context_length - stride + 1)
    return Windows(text, start, length, context)


def batches_of_similar_length(windows: Windows, batch_tokens: int) -> Iterator[NDArray[np.int64]]:
    """Group windows so that little is padded; the longest first, so that memory runs out early.

    Yields:
        Indices of the windows of one batch: at most `batch_tokens` positions after padding to the
        longest of them, and at least one window.
    """
    order = np.argsort(-windows.positions, kind="stable")
    first = 0
    while first < len(order):
        rows = max(1, batch_tokens // int(windows.positions[order[first]]))
        yield order[first : first + rows]
        first += rows


@dataclass(frozen=True)
class Batch:
    """What the model reads and what it shall predict, int64 [windows, longest].

    Padding is to the right, where a causal model cannot see it. Targets that are only context or
    padding are `IGNORED`; `place` [scored tokens] are the others' positions in the stream of
    tokens that the windows were cut from, in the order of the targets.
    """

    inputs: NDArray[np.int64]
    target: NDArray[np.int64]
    place: NDArray[np.int64]


def make_batch(
    tokens: NDArray[np.int64],
    text_starts: NDArray[np.int64],
    windows: Windows,
    chosen: NDArray[np.int64],
    in_front: Sequence[int],
) -> Batch:
    """One batch of windows of the texts that start at `text_starts` in `tokens`.

    Args:
        tokens: the texts one after the other, int64.
        text_starts: where each starts, int64 [texts].
        windows: all windows of the texts.
        chosen: which of them make the batch.
        in_front: ids in front of every text; the last one is the padding too. Never scored.
    """
    shape = len(chosen), int(windows.positions[chosen].max())
    inputs = np.full(shape, in_front[-1], dtype=np.int64)
    target = np.full(shape, IGNORED, dtype=np.int64)
    places = []
    for row, window in enumerate(chosen):
        begin = int(text_starts[windows.text[window]])
        first = begin + int(windows.start[window])
        last = first + int(windows.length[window])
        context = int(windows.context[window])
        read = tokens[max(first - context, begin) : last - 1]
        positions = context + last - first - 1
        missing = positions - len(read)  # of the context, where the text begins after it
        inputs[row, :missing] = in_front[len(in_front) - missing :]
        inputs[row, missing:positions] = read
        target[row, context - 1 : positions] = tokens[first:last]
        places.append(np.arange(first, last))
    return Batch(inputs, target, np.concatenate(places))
