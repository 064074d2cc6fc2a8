"""An evaluation in pieces: consecutive documents of one domain, scored and kept together.

A chunk is what is read at once, what one rank does, and what an interrupted evaluation does not
repeat. Which documents form a chunk depends on the selection and the batch size alone, and inside a
chunk every sum runs over the tokens in their order: numbers depend neither on how many ranks there
are nor on where an evaluation was interrupted.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from megatron_infoentropy.evaluate.buckets import BANDS
from megatron_infoentropy.evaluate.dataset import TokenDataset
from megatron_infoentropy.evaluate.errors import NonFiniteScoreError
from megatron_infoentropy.evaluate.model import ScoringModel
from megatron_infoentropy.evaluate.scores import token_scores
from megatron_infoentropy.evaluate.selection import Selection, document_sha256
from megatron_infoentropy.evaluate.tally import Tally
from megatron_infoentropy.evaluate.windows import (
    Batch,
    batches_of_similar_length,
    cut_windows,
    make_batch,
)
from megatron_infoentropy.progress import Advance

_BATCHES = 16  # about, in a chunk


@dataclass(frozen=True)
class Scoring:
    """How tokens are scored; `packed`: documents follow one another in a window.

    The ids `context` stand in front of every text; `behind_start`: they are its start token.
    """

    context_length: int
    stride: int
    packed: bool
    batch_tokens: int
    context: tuple[int, ...]
    behind_start: bool

    @property
    def rule(self) -> str:
        """In a sentence."""
        what = "every document separately, with the end-of-document token as its first context"
        if self.behind_start:
            what = "every document separately, behind its start token, which is not scored"
        if self.packed:
            what = "documents of a domain one after the other, in pieces of whole documents"
        return (
            f"{what}; windows of {self.context_length} tokens, each scoring the next "
            f"{self.stride} and seeing the {self.context_length - self.stride + 1} before them; "
            "every token scored exactly once, an end-of-document token that closes a document "
            "included; plain cross entropy in fp32, summed in fp64"
        )


@dataclass(frozen=True)
class ChunkScores:
    """Of the documents of one chunk: sums [documents, bands], and every token's two numbers."""

    tokens: NDArray[np.int64]
    ce: NDArray[np.float64]
    entropy: NDArray[np.float64]
    sha256: NDArray[np.uint8]  # [documents, 32]
    scores: NDArray[np.float16]  # [tokens, 2]
    tally: Tally


def cut_chunks(selection: Selection, batch_tokens: int) -> list[slice]:
    """Documents of every chunk, in order: of one domain, about 16 batches of tokens."""
    chunks, first, filled = [], 0, 0
    for row in range(len(selection)):
        new_domain = selection.domain[row] != selection.domain[first]
        if row > first and (new_domain or filled >= _BATCHES * batch_tokens):
            chunks.append(slice(first, row))
            first, filled = row, 0
        filled += int(selection.length[row])
    return [*chunks, slice(first, len(selection))]


def chunk_batches(
    tokens: NDArray[np.int64], lengths: NDArray[np.int64], scoring: Scoring
) -> Iterator[Batch]:
    """Batches of one chunk's tokens, which are documents of these lengths."""
    texts = np.array([len(tokens)]) if scoring.packed else lengths
    starts = np.cumsum(texts) - texts
    context = scoring.context[-scoring.context_length :]
    windows = cut_windows(texts, scoring.context_length, scoring.stride, len(context))
    for chosen in batches_of_similar_length(windows, scoring.batch_tokens):
        yield make_batch(tokens, starts, windows, chosen, context)


def score_chunk(
    model: ScoringModel,
    dataset: TokenDataset,
    selection: Selection,
    rows: slice,
    band_of_token: NDArray[np.int8],
    scoring: Scoring,
    advance: Advance,
) -> ChunkScores:
    """Score the documents `rows` of a selection.

    Raises:
        NonFiniteScoreError: naming the first document with a NaN or infinite score.
    """
    lengths = selection.length[rows]
    documents = _read(dataset, selection, rows)
    tokens = np.concatenate(documents)
    per_token = np.empty((4, len(tokens)), dtype=np.float32)
    with torch.inference_mode():
        for batch in chunk_batches(tokens, lengths, scoring):
            inputs, target = torch.from_numpy(batch.inputs), torch.from_numpy(batch.target)
            # Without a name the logits go before the next batch has its own.
            found = token_scores(model.logits(inputs), target)
            for column, values in zip(per_token, found, strict=True):
                column[batch.place] = values
            advance(len(batch.place))
    _require_finite(per_token, dataset, selection, rows)
    ce, entropy = per_token[:2]
    tally = Tally(model.vocab_size)
    tally.add(*per_token)
    cell = np.repeat(np.arange(len(lengths)) * BANDS, lengths) + band_of_token[tokens]
    shape = len(lengths), BANDS

    def by_band(values: NDArray[np.float32] | None) -> NDArray[Any]:
        return np.bincount(cell, weights=values, minlength=len(lengths) * BANDS).reshape(shape)

    digests = b"".join(document_sha256(document) for document in documents)
    return ChunkScores(
        by_band(None),
        by_band(ce),
        by_band(entropy),
        np.frombuffer(digests, np.uint8).reshape(-1, 32),
        per_token[:2].T.astype(np.float16),
        tally,
    )


def _read(dataset: TokenDataset, selection: Selection, rows: slice) -> list[NDArray[np.int64]]:
    domain = dataset.domains[selection.domain[rows.start]]
    places = zip(selection.document[rows], selection.length[rows], strict=True)
    return [domain.read(int(number), 0, int(length)).astype(np.int64) for number, length in places]


def _require_finite(
    per_token: NDArray[np.float32], dataset: TokenDataset, selection: Selection, rows: slice
) -> None:
    bad = np.flatnonzero(~np.isfinite(per_token[:2]).all(axis=0))
    if not bad.size:
        return
    ends = np.cumsum(selection.length[rows])
    row = rows.start + int(np.searchsorted(ends, bad[0], side="right"))
    position = int(bad[0] - (ends[row - rows.start] - selection.length[row]))
    name = dataset.domains[selection.domain[row]].name
    raise NonFiniteScoreError(
        f"{bad.size} of {per_token.shape[1]} tokens have no finite score, first token {position} "
        f"of document {selection.document[row]} of domain {name!r}: cross entropy "
        f"{per_token[0, bad[0]]}, entropy {per_token[1, bad[0]]}; the weights or the activations "
        "hold NaN or infinity: check the checkpoint and its export, or score in float32"
    )
