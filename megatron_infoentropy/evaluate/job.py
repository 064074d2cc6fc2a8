"""Everything about an evaluation that is settled before the first token is scored."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_infoentropy.evaluate.buckets import frequency_bands, read_token_counts
from megatron_infoentropy.evaluate.chunks import Scoring
from megatron_infoentropy.evaluate.dataset import TokenDataset, open_dataset
from megatron_infoentropy.evaluate.domain_weights import domain_weights
from megatron_infoentropy.evaluate.evaluation import FORMAT
from megatron_infoentropy.evaluate.model import (
    ModelSource,
    ScoringModel,
    context_length_of,
    load_model,
    require_same_tokenizer,
    require_same_vocabulary,
)
from megatron_infoentropy.evaluate.ranks import choose_device
from megatron_infoentropy.evaluate.selection import Selection, places_sha256, select_documents


@dataclass(frozen=True)
class Options:
    """How to score; the fields are explained by `perplexity.evaluate_model`."""

    context_length: int | None = None
    stride: int | None = None
    packed: bool = False
    batch_tokens: int = 4096
    max_tokens: int | None = None
    domain_weights: str = "auto"
    dtype: str = "float32"
    device: str = "auto"


@dataclass(frozen=True)
class Job:
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

    def plan(self) -> dict[str, Any]:
        """What must be the same for an interrupted evaluation to go on."""
        return {
            "format": FORMAT,
            "scoring": asdict(self.scoring) | {"context": list(self.scoring.context)},  # as JSON
            "model": self.model.describe() | {"weights_sha256": self.model.weights_sha256()},
            "data": self.dataset.state,
            "documents": places_sha256(self.dataset, self.selection, self.band_of_token),
        }


def open_job(source: ModelSource, data: Path, token_counts: Path, options: Options) -> Job:
    """Open model and data, cheap checks first.

    Raises:
        ValueError: one of the named errors of `evaluate.errors`, saying what does not fit.
    """
    if options.batch_tokens < 1:
        raise ValueError(f"batch_tokens must be at least 1, got {options.batch_tokens}")
    dataset = open_dataset(data, packed=options.packed)
    require_same_tokenizer(source, dataset.tokenizer_sha256)
    counts = read_token_counts(token_counts, dataset.vocab_size).sum(axis=0)
    band_of_token = frequency_bands(counts)
    selection = select_documents(dataset, options.max_tokens)
    scored = {
        domain.name: int(selection.length[selection.domain == index].sum())
        for index, domain in enumerate(dataset.domains)
    }
    weights, weights_are = domain_weights(options.domain_weights, scored, token_counts)
    model = load_model(source, choose_device(options.device), options.dtype)
    require_same_vocabulary(model, dataset.vocab_size)
    length = context_length_of(model, options.context_length)
    stride = _stride(options.stride, length)
    behind_start = any(domain.skipped for domain in dataset.domains)
    scoring = Scoring(
        length, stride, options.packed, options.batch_tokens, dataset.context, behind_start
    )
    return Job(
        model, source, dataset, selection, scoring, counts, band_of_token, weights, weights_are
    )


def _stride(stride: int | None, context_length: int) -> int:
    if stride is None:
        return context_length
    if not 1 <= stride <= context_length:
        raise ValueError(
            f"stride must be between 1 and the context length {context_length}, got {stride}: "
            "with a larger one tokens would be left out"
        )
    return stride
