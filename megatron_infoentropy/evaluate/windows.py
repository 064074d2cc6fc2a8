"""How documents are cut for scoring, so that every token is scored exactly once.

A document of n tokens x_0 ... x_(n-1) is prefixed with the end-of-document token as context and
scored in windows of at most L, the model's context length. Window k reads x_(kL-1) ... and
predicts x_(kL) ... x_(kL+L-1): windows share no predicted token, and only one token of context.

    eod x0 x1 x2 | x3 x4 ...          inputs   (L = 4)
    x0  x1 x2 x3 | x4 x5 ...          targets
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Windows:
    """All windows of a set of documents; three int64 arrays of one length.

    `document` counts through the documents given, `start` is the position of the first predicted
    token in its document, `length` the number of predicted tokens.
    """

    document: NDArray[np.int64]
    start: NDArray[np.int64]
    length: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.document)


def cut_windows(document_lengths: NDArray[np.int64], context_length: int) -> Windows:
    """Cut documents of the given lengths (tokens, all > 0) into windows of `context_length`."""
    per_document = -(-document_lengths // context_length)
    document = np.repeat(np.arange(len(document_lengths)), per_document)
    first = np.cumsum(per_document) - per_document
    start = (np.arange(len(document)) - first[document]) * context_length
    length = np.minimum(document_lengths[document] - start, context_length)
    return Windows(document, start, length)


def batches_of_similar_length(windows: Windows, batch_tokens: int) -> Iterator[NDArray[np.int64]]:
    """Group windows so that little is padded; the longest first, so that memory runs out early.

    Yields:
        Indices of the windows of one batch: at most `batch_tokens` positions after padding to the
        longest of them, and at least one window.
    """
    order = np.argsort(-windows.length, kind="stable")
    first = 0
    while first < len(order):
        rows = max(1, batch_tokens // int(windows.length[order[first]]))
        yield order[first : first + rows]
        first += rows


def padded_batch(
    pieces: list[NDArray[np.int64]], padding_id: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Inputs and targets of one batch.

    Args:
        pieces: for every window its context token followed by the tokens to predict, int64.
        padding_id: any valid token id; what stands in the padded inputs is never scored.

    Returns:
        inputs and targets, int64 [windows, longest]; padding is always to the right, where a
        causal model cannot see it, and -100 in the targets.
    """
    longest = max(len(piece) for piece in pieces) - 1
    inputs = np.full((len(pieces), longest), padding_id, dtype=np.int64)
    target = np.full((len(pieces), longest), -100, dtype=np.int64)
    for row, piece in enumerate(pieces):
        inputs[row, : len(piece) - 1] = piece[:-1]
        target[row, : len(piece) - 1] = piece[1:]
    return inputs, target
