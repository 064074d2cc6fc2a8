"""An evaluation in chunks: documents cut into windows, scored, and written down one by one.

**Windows.** A text of n tokens x_0 ... x_(n-1) is prefixed with a context: the start token that its
tokenizer puts there, else the end-of-document token. The first window predicts up to L tokens, L
being the context length (fewer where the context has more tokens than one); every further window
predicts the next S <= L, the stride, and sees the L - S + 1 tokens before them. With S = L windows
share no predicted token and only one token of context; the smaller S, the more context, at L / S
times the work.

    L = 4, S = 4                            L = 4, S = 2
    eod x0 x1 x2 | x3 x4 ...    inputs      eod x0 x1 x2 | x1 x2 x3 x4 | x3 ...
    x0  x1 x2 x3 | x4 x5 ...    targets     x0  x1 x2 x3 | .. .. x4 x5 | .. .. x6 x7

**Chunks.** A chunk is a run of documents of one domain: what is read at once, what one rank does,
and what an interrupted evaluation does not repeat. Which documents form a chunk depends on the
selection and the batch size alone, and sums run over the tokens in their order: numbers depend
neither on how many ranks there are nor on where an evaluation was interrupted.

**The journal** holds the chunks that are done, beside the result:

    evaluation.unfinished/plan.json            what is scored, with what, and how
    evaluation.unfinished/scores_000017.npz    of one chunk's tokens, whole or not there

An evaluation of the same plan takes what is there; one of another plan is refused. The folder goes
when the result has been written.
"""

import json
import shutil
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from megatron_infoentropy import kernels
from megatron_infoentropy.evaluate.dataset import Selection, TokenDataset, places_sha256
from megatron_infoentropy.evaluate.evaluation import FORMAT, UNFINISHED, UnfinishedEvaluationError
from megatron_infoentropy.evaluate.model import ModelSource, ScoringModel
from megatron_infoentropy.files import write_atomically, write_whole
from megatron_infoentropy.kernels.contract import PLAIN, Shard
from megatron_infoentropy.loss.collective import merge_shards
from megatron_infoentropy.loss.layout import as_rows
from megatron_infoentropy.loss.statistics import token_results
from megatron_infoentropy.progress import Advance

IGNORED = -100  # a target that is not scored
_BATCHES = 16  # about, in a chunk
_PLAN = "plan.json"


@dataclass(frozen=True)
class Window:
    """A slice of the stream: the model reads [begin, end - 1) and predicts [first, end)."""

    begin: int
    first: int
    end: int

    @property
    def positions(self) -> int:
        """Return how many tokens the model reads."""
        return self.end - 1 - self.begin


def cut_windows(
    text_lengths: Iterable[int], context_length: int, stride: int, in_front: int = 1
) -> list[Window]:
    """Cut a stream of texts (all of one token or more); 1 <= stride <= context_length.

    in_front: tokens of context in front of every text, 1 to context_length.
    """
    windows, start = [], 0
    for length in text_lengths:
        stop = start + in_front + length
        end = min(start + context_length + 1, stop)
        windows.append(Window(start, start + in_front, end))
        for first in range(end, stop, stride):
            begin = first - (context_length - stride + 1)
            windows.append(Window(begin, first, min(first + stride, stop)))
        start = stop
    return windows


def batches_of_similar_length(
    windows: Iterable[Window], batch_tokens: int
) -> Iterator[list[Window]]:
    """Group windows so that little is padded; the longest first, so that memory runs out early.

    Yields:
        At most `batch_tokens` positions after padding to the longest, and at least one window.
    """
    ordered = sorted(windows, key=lambda window: -window.positions)
    first = 0
    while first < len(ordered):
        rows = max(1, batch_tokens // ordered[first].positions)
        yield ordered[first : first + rows]
        first += rows


def make_batch(
    stream: NDArray[np.int64], windows: list[Window], padding: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return what the model reads and what it shall predict, int64 [windows, longest].

    Padding is to the right, where a causal model cannot see it. Targets that are only context or
    padding are `IGNORED`.
    """
    shape = len(windows), max(window.positions for window in windows)
    inputs = np.full(shape, padding, dtype=np.int64)
    target = np.full(shape, IGNORED, dtype=np.int64)
    for row, window in enumerate(windows):
        scored = slice(window.first - window.begin - 1, window.positions)
        inputs[row, : window.positions] = stream[window.begin : window.end - 1]
        target[row, scored] = stream[window.first : window.end]
    return inputs, target


def token_scores(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Score logits [..., vocabulary] of any floating dtype against targets [...], in fp32.

    Rows whose target is `IGNORED` are not read. The public loss function gives all of this but the
    confidence, 1 / sum e^(x - max), which the same read of the logits knows.

    Returns:
        Of the scored tokens, in the order of the targets: cross entropy and entropy in nats, the
        probability of the most probable token, and 1 where no token is more probable than the
        target; fp32 on the CPU, [4, scored].
    """
    rows = as_rows(logits, target.to(logits.device))
    vocabulary = logits.shape[-1]
    backend = kernels.select("auto", logits.device, logits.dtype)
    shard = Shard(0, vocabulary, IGNORED)
    statistics = backend.shard_statistics(rows.logits_NV, rows.target_N, shard, PLAIN)
    row = merge_shards(statistics[None], [vocabulary])
    results, saved = token_results(row, rows.target_N, vocabulary, IGNORED, PLAIN)
    columns = (results.cross_entropy, results.entropy, 1 / saved.z, results.is_top)
    every = torch.stack([rows.restore(column, target) for column in columns]).cpu()
    return every[:, target.cpu() != IGNORED]


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
        """Return how tokens are scored, in a sentence."""
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


def cut_chunks(selection: Selection, batch_tokens: int) -> list[slice]:
    """Return the documents of every chunk, in order: of one domain, about 16 batches of tokens."""
    chunks, first, filled = [], 0, 0
    for row in range(len(selection)):
        new_domain = selection.domain[row] != selection.domain[first]
        if row > first and (new_domain or filled >= _BATCHES * batch_tokens):
            chunks.append(slice(first, row))
            first, filled = row, 0
        filled += int(selection.length[row])
    return [*chunks, slice(first, len(selection))]


@dataclass(frozen=True)
class ScoringJob:
    """A model, the documents it scores, and how."""

    model: ScoringModel
    source: ModelSource
    dataset: TokenDataset
    selection: Selection
    scoring: Scoring
    counts: NDArray[np.int64]  # of every token id in the training data
    band_of_token: NDArray[np.int8]
    weights: dict[str, float]  # of the domains, any scale
    weights_are: str

    @cached_property
    def plan(self) -> dict[str, Any]:
        """Return what must be the same for an interrupted evaluation to go on."""
        return {
            "format": FORMAT,
            "scoring": asdict(self.scoring) | {"context": list(self.scoring.context)},  # as JSON
            "model": self.model.describe() | {"weights_sha256": self.model.weights_sha256()},
            "data": self.dataset.state,
            "documents": places_sha256(self.dataset, self.selection, self.band_of_token),
        }

    @cached_property
    def chunks(self) -> list[slice]:
        return cut_chunks(self.selection, self.scoring.batch_tokens)


def score_chunk(job: ScoringJob, rows: slice, advance: Advance) -> NDArray[np.float32]:
    """Return `token_scores` of the documents `rows` of a job's selection, in their order.

    Raises:
        ValueError: a NaN or infinite score, naming the first document with one.
    """
    documents = job.selection.read(job.dataset, rows)
    texts = [np.concatenate(documents)] if job.scoring.packed else documents
    per_token = _score_texts(job, texts, advance)
    _require_finite(per_token, job, rows)
    return per_token


def _score_texts(
    job: ScoringJob, texts: list[NDArray[np.int64]], advance: Advance
) -> NDArray[np.float32]:
    """Return `token_scores` of all tokens of the texts, each behind a context of its own."""
    scoring = job.scoring
    context = np.array(scoring.context[-scoring.context_length :])
    stream = np.concatenate([part for text in texts for part in (context, text)])
    is_scored = np.zeros(len(stream), dtype=bool)
    per_token = np.empty((4, len(stream)), dtype=np.float32)
    windows = cut_windows(map(len, texts), scoring.context_length, scoring.stride, len(context))
    with torch.inference_mode():
        for batch in batches_of_similar_length(windows, scoring.batch_tokens):
            inputs, target = map(torch.from_numpy, make_batch(stream, batch, int(context[-1])))
            place = np.concatenate([np.arange(window.first, window.end) for window in batch])
            # Without a name the logits go before the next batch has its own.
            per_token[:, place] = token_scores(job.model.logits(inputs), target)
            is_scored[place] = True
            advance(len(place))
    return per_token[:, is_scored]


def _require_finite(per_token: NDArray[np.float32], job: ScoringJob, rows: slice) -> None:
    selection = job.selection
    bad = np.flatnonzero(~np.isfinite(per_token[:2]).all(axis=0))
    if not bad.size:
        return
    ends = np.cumsum(selection.length[rows])
    row = rows.start + int(np.searchsorted(ends, bad[0], side="right"))
    position = int(bad[0] - (ends[row - rows.start] - selection.length[row]))
    name = job.dataset.domains[selection.domain[row]].name
    raise ValueError(
        f"{bad.size} of {per_token.shape[1]} tokens have no finite score, first token {position} "
        f"of document {selection.document[row]} of domain {name!r}: cross entropy "
        f"{per_token[0, bad[0]]}, entropy {per_token[1, bad[0]]}; the weights or the activations "
        "hold NaN or infinity: check the checkpoint and its export, or score in float32"
    )


class ChunkJournal:
    """The chunks that are done, below the folder of an evaluation's result; ranks share it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / UNFINISHED

    def start(self, plan: dict[str, Any], *, restart: bool) -> None:
        """Begin, or go on with what is there; one rank does it for all.

        Raises:
            UnfinishedEvaluationError: something else was interrupted here.
        """
        path = self.folder / _PLAN
        if restart:
            shutil.rmtree(self.folder, ignore_errors=True)
        if path.is_file():
            before = json.loads(path.read_text(encoding="utf-8"))
            different = [name for name in plan if before.get(name) != plan[name]]
            if different:
                raise UnfinishedEvaluationError(
                    f"{self.folder} holds an interrupted evaluation with another "
                    f"{' and '.join(different)}: name another --output, or --restart to discard it"
                )
        else:
            write_whole(path, json.dumps(plan, indent=2) + "\n")

    def has(self, chunk: int) -> bool:
        return self._path(chunk).is_file()

    def write(self, chunk: int, scores: NDArray[np.float32]) -> None:
        with write_atomically(self._path(chunk)) as temporary, temporary.open("wb") as file:
            np.savez(file, scores=scores)

    def read(self, chunk: int, tokens: int) -> NDArray[np.float32]:
        """Read the scores of a chunk of so many tokens.

        Raises:
            UnfinishedEvaluationError: the chunk is missing or damaged.
        """
        try:
            with np.load(self._path(chunk), allow_pickle=False) as arrays:
                scores: NDArray[np.float32] = arrays["scores"]
            if scores.shape != (4, tokens):
                raise ValueError(f"expected the scores of {tokens} tokens, got {scores.shape}")
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            self._path(chunk).unlink(missing_ok=True)
            raise UnfinishedEvaluationError(
                f"part {chunk} of the evaluation in {self.folder} cannot be read ({error}) and was "
                "removed: repeat the command, which scores it again; several ranks need one folder"
            ) from error
        return scores

    def finish(self) -> None:
        """Remove it: the result has been written."""
        shutil.rmtree(self.folder)

    def _path(self, chunk: int) -> Path:
        return self.folder / f"scores_{chunk:06d}.npz"
