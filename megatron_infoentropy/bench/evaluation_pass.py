"""How much longer an evaluation takes than the forward passes it needs.

One random Llama and one set of documents; in every round, in turning order, each of

    forward        the model's bare forward over the batches that the evaluation makes, ready made
    evaluation     all that `infoentropy evaluate` does for these documents: reading, cutting,
                   batches, forward, cross entropy, entropy and confidence of every token by our
                   kernel, sums, and writing them into the journal
    log-softmax    the forward, and what is often written instead: log-probabilities of the whole
                   vocabulary in fp32, cross entropy and entropy from them

What else the machine does falls on a round's passes alike: ratios are taken round by round, and
their median has an interval by resampling the rounds.
"""

import csv
import io
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_infoentropy.bench.clock import Clock, clock_for
from megatron_infoentropy.bench.results import provenance
from megatron_infoentropy.evaluate.dataset import Domain, Selection, TokenDataset
from megatron_infoentropy.evaluate.model import DTYPES, ScoringModel
from megatron_infoentropy.evaluate.scoring import (
    IGNORED,
    ChunkJournal,
    Scoring,
    chunk_batches,
    score_chunk,
)
from megatron_infoentropy.files import write_atomically
from megatron_infoentropy.progress import progress

RESAMPLES, INTERVAL = 4000, (0.025, 0.975)


@dataclass(frozen=True)
class Shape:
    """Of the model and of what it scores in a round."""

    vocabulary: int = 32000
    hidden: int = 512
    layers: int = 8
    context: int = 512
    tokens: int = 1024
    batch_tokens: int = 1024
    dtype: str = "float32"


@dataclass(frozen=True)
class Pass:
    """One way through the documents: milliseconds, and times the bare forward with its interval."""

    name: str
    rounds: int
    median_ms: float
    times_forward: float
    times_forward_low: float
    times_forward_high: float


def bench_evaluation(shape: Shape, *, rounds: int, output: Path | None = None) -> list[Pass]:
    """Time the three passes; write them with `shape` and provenance into a CSV file.

    Raises:
        ValueError: results would be written without the commit they belong to.
    """
    facts = provenance() if output else {}  # refuses before the work, not after it
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        passes = _passes(shape, device, Path(folder))
        times = _timed(passes, clock_for(device), rounds)
    rows = [_row(name, times[name], times["forward"]) for name in passes]
    if output:
        _write(rows, shape, facts, output)
    return rows


def _passes(shape: Shape, device: torch.device, folder: Path) -> dict[str, Callable[[], object]]:
    model, (dataset, selection) = _model(shape, device), _documents(shape)
    scoring = Scoring(shape.context, shape.context, False, shape.batch_tokens, (0,), False)
    rows = slice(0, len(selection))
    bands = (np.arange(shape.vocabulary) % 20).astype(np.int8)
    journal = ChunkJournal(folder, shape.vocabulary)
    journal.folder.mkdir()
    tokens = np.concatenate([dataset.domains[0].read(d, 0, 1 << 40) for d in selection.document])
    batches = [
        (torch.from_numpy(batch.inputs).to(device), torch.from_numpy(batch.target).to(device))
        for batch in chunk_batches(tokens.astype(np.int64), selection.length, scoring)
    ]

    def forward() -> None:
        for inputs, _ in batches:
            model.logits(inputs)

    def evaluation() -> None:
        scores = score_chunk(model, dataset, selection, rows, bands, scoring, lambda work: None)
        journal.write(0, scores)

    def log_softmax() -> None:
        for inputs, target in batches:
            log_p = model.logits(inputs).float().log_softmax(-1)
            log_p.gather(-1, target.clamp(min=0)[..., None])[target[..., None] != IGNORED].cpu()
            (-(log_p.exp() * log_p).sum(-1))[target != IGNORED].cpu()

    return {"forward": forward, "evaluation": evaluation, "log-softmax": log_softmax}


def _model(shape: Shape, device: torch.device) -> ScoringModel:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    dtype = DTYPES[shape.dtype]
    config = LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.hidden * 8 // 3,
        num_hidden_layers=shape.layers,
        num_attention_heads=max(1, shape.hidden // 64),
        max_position_embeddings=shape.context,
    )
    network: Any = LlamaForCausalLM(config)
    return ScoringModel(network.to(device, dtype).eval(), device, dtype)


def _documents(shape: Shape) -> tuple[TokenDataset, Selection]:
    """Documents of up to three windows, `shape.tokens` tokens in all."""
    generator = np.random.default_rng(0)
    lengths: list[int] = []
    while (left := shape.tokens - sum(lengths)) > 0:
        lengths.append(min(left, int(generator.integers(1, 3 * shape.context))))
    tokens = generator.integers(shape.vocabulary, size=shape.tokens).astype(np.int32)
    documents = np.split(tokens, np.cumsum(lengths)[:-1])
    domain = Domain("random", documents, np.array(lengths), shape.tokens)  # type: ignore[arg-type]
    dataset = TokenDataset([domain], "", shape.vocabulary, (0,), "", 0)
    numbers = np.arange(len(documents))
    return dataset, Selection(np.zeros_like(numbers), numbers, np.array(lengths), [True])


def _timed(
    passes: dict[str, Callable[[], object]], clock: Clock, rounds: int
) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {name: [] for name in passes}
    names = list(passes)
    with progress("passes", (1 + rounds) * len(names), "passes") as advance:
        for turn in range(-1, rounds):  # the first one warms up
            first = turn % len(names)
            for name in names[first:] + names[:first]:
                clock.start()
                passes[name]()
                clock.mark()
                if turn >= 0:
                    times[name] += clock.read()
                advance(1)
    return times


def _row(name: str, times: list[float], forward: list[float]) -> Pass:
    ratios = np.array(times) / np.array(forward)
    drawn = np.random.default_rng(0).integers(len(ratios), size=(RESAMPLES, len(ratios)))
    low, high = np.quantile(np.median(ratios[drawn], axis=1), INTERVAL)
    median = float(np.median(ratios))
    return Pass(name, len(times), float(np.median(times)), median, float(low), float(high))


def _write(rows: list[Pass], shape: Shape, facts: dict[str, str], output: Path) -> None:
    month = facts["date"].replace("-", "")[:6]
    kind = "gpu" if torch.cuda.is_available() else "cpu"
    path = output / f"evaluation_{kind}_{month}.csv" if output.is_dir() else output
    text = io.StringIO()
    table = [asdict(row) | asdict(shape) | {"threads": torch.get_num_threads()} | facts
             for row in rows]  # fmt: skip
    writer = csv.DictWriter(text, list(table[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(table)
    with write_atomically(path) as temporary:
        temporary.write_text(text.getvalue(), encoding="utf-8")
