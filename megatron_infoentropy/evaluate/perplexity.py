"""Perplexity of a Hugging Face model per domain and per token-frequency bucket.

Steps: check that model, data and token counts speak of the same vocabulary; cut the documents into
windows; score batches of similar length; add every token's cross entropy and entropy to its
document, its frequency bucket and an entropy bin; turn the sums into numbers. Always plain cross
entropy, whatever objective the model was trained with, in fp32, summed in fp64.
"""

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from megatron_infoentropy import vocab_parallel_statistics
from megatron_infoentropy.evaluate.buckets import (
    BUCKETS,
    DECILES,
    RULE,
    describe_bands,
    frequency_bands,
    read_token_counts,
)
from megatron_infoentropy.evaluate.dataset import TokenDataset, open_dataset
from megatron_infoentropy.evaluate.errors import NonFiniteScoreError
from megatron_infoentropy.evaluate.evaluation import (
    FORMAT,
    DocumentSums,
    Evaluation,
)
from megatron_infoentropy.evaluate.model import (
    ScoringModel,
    load_model,
    require_model_folder,
    require_same_tokenizer,
    require_same_vocabulary,
)
from megatron_infoentropy.evaluate.selection import Selection, fingerprint, select_documents
from megatron_infoentropy.evaluate.summary import summarise_documents
from megatron_infoentropy.evaluate.tally import Tally
from megatron_infoentropy.evaluate.windows import (
    Windows,
    batches_of_similar_length,
    cut_windows,
    padded_batch,
)
from megatron_infoentropy.progress import progress

SCORING_RULE = (
    "every document separately, with the end-of-document token as its first context; cut into "
    "windows of the model's context length that share no scored token and overlap by one token of "
    "context; every token scored exactly once, an end-of-document token that closes a document "
    "included; plain cross entropy from fp32 logits, summed in fp64"
)


def evaluate_model(
    model: Path,
    data: Path,
    *,
    token_counts: Path,
    batch_tokens: int = 4096,
    max_tokens: int | None = None,
    device: str = "auto",
) -> Evaluation:
    """Score a Hugging Face folder on a token dataset.

    Args:
        model: folder with config.json, weights and tokenizer.json; nothing is fetched.
        data: folder with manifest.json and one .bin/.idx a domain.
        token_counts: token_counts.npy of the *training* data, which defines the buckets.
        batch_tokens: tokens scored at once; the logits of a batch take 4 bytes x this x vocabulary.
        max_tokens: score a fixed sample of about this many tokens instead of everything.
        device: torch device, or "auto" for the first GPU, else the CPU.

    Returns:
        nats per token, perplexity and mean entropy in total, by domain and by bucket; bits per byte
        of the domains that were scored whole; per-document sums for paired comparison.

    Raises:
        ValueError: one of the named errors of `evaluate.errors`, saying what does not fit.
    """
    if batch_tokens < 1:
        raise ValueError(f"batch_tokens must be at least 1, got {batch_tokens}")
    dataset, scoring_model = _open(model, data, device)
    counts = read_token_counts(token_counts, dataset.vocab_size).sum(axis=0)
    band_of_token = frequency_bands(counts)
    selection = select_documents(dataset, max_tokens)
    sums = _score(scoring_model, dataset, selection, band_of_token, batch_tokens)
    return _result(scoring_model, dataset, selection, sums, counts, band_of_token)


def _result(
    model: ScoringModel,
    dataset: TokenDataset,
    selection: Selection,
    sums: Tally,
    counts: NDArray[np.int64],
    band_of_token: NDArray[np.int8],
) -> Evaluation:
    documents = DocumentSums(
        selection.domain, selection.document, sums.tokens, sums.ce, sums.entropy
    )
    summary = {
        "format": FORMAT,
        "scoring": {"rule": SCORING_RULE, "context_length": model.context_length},
        "model": _describe_model(model),
        "data": {
            "fingerprint": fingerprint(dataset, selection, band_of_token),
            "tokenizer_sha256": dataset.tokenizer_sha256,
            "complete": all(selection.complete),
        },
        "bucket_rule": RULE,
        "bucket_sizes": describe_bands(BUCKETS, counts, band_of_token),
        "decile_sizes": describe_bands(DECILES, counts, band_of_token),
        **_numbers(documents, dataset, selection),
        "entropy_histogram": sums.histogram(),
    }
    return Evaluation(summary, documents)


def _open(model: Path, data: Path, device: str) -> tuple[TokenDataset, ScoringModel]:
    """Open both, cheap checks first."""
    require_model_folder(model)
    dataset = open_dataset(data)
    require_same_tokenizer(model, dataset.tokenizer_sha256)
    scoring_model = load_model(model, device)
    require_same_vocabulary(scoring_model, dataset.vocab_size)
    return dataset, scoring_model


def _score(
    model: ScoringModel,
    dataset: TokenDataset,
    selection: Selection,
    band_of_token: NDArray[np.int8],
    batch_tokens: int,
) -> Tally:
    windows = cut_windows(selection.length, model.context_length)
    sums = Tally(len(selection.document), dataset.vocab_size)
    with (
        torch.inference_mode(),
        progress("scoring", total=int(windows.length.sum()), unit="tokens") as advance,
    ):
        for batch in batches_of_similar_length(windows, batch_tokens):
            pieces = [_piece(dataset, selection, windows, index) for index in batch]
            inputs, target = padded_batch(pieces, dataset.eod_id)
            scored = target.ravel() != -100
            tokens = target.ravel()[scored]
            logits = model.logits(torch.from_numpy(inputs)).flatten(0, 1)
            kept = logits if scored.all() else logits[torch.from_numpy(scored).to(logits.device)]
            statistics = vocab_parallel_statistics(kept, torch.from_numpy(tokens).to(kept.device))
            ce = statistics.cross_entropy.double().cpu().numpy()
            entropy = statistics.entropy.double().cpu().numpy()
            document = np.repeat(windows.document[batch], windows.length[batch])
            _require_finite(ce, entropy, document, selection, dataset)
            sums.add(document, band_of_token[tokens], ce, entropy)
            advance(len(tokens))
    return sums


def _piece(
    dataset: TokenDataset, selection: Selection, windows: Windows, index: int
) -> NDArray[np.int64]:
    """The context token of a window and the tokens it predicts, int64 [length + 1]."""
    row, start = int(windows.document[index]), int(windows.start[index])
    stop = start + int(windows.length[index])
    domain = dataset.domains[selection.domain[row]]
    tokens = domain.read(int(selection.document[row]), max(start - 1, 0), stop).astype(np.int64)
    return tokens if start > 0 else np.concatenate([[dataset.eod_id], tokens])


def _require_finite(
    ce: NDArray[np.float64],
    entropy: NDArray[np.float64],
    document: NDArray[np.int64],
    selection: Selection,
    dataset: TokenDataset,
) -> None:
    bad = np.flatnonzero(~(np.isfinite(ce) & np.isfinite(entropy)))
    if bad.size:
        row = document[bad[0]]
        name = dataset.domains[selection.domain[row]].name
        raise NonFiniteScoreError(
            f"{bad.size} of {ce.size} tokens of a batch have cross entropy {ce[bad[0]]} (entropy "
            f"{entropy[bad[0]]}), first in document {selection.document[row]} of domain {name!r}: "
            "the weights hold NaN or infinity; check the checkpoint and its export"
        )


def _describe_model(model: ScoringModel) -> dict[str, Any]:
    import transformers

    return {
        "class": type(model.network).__name__,
        "parameters": model.parameters,
        "vocab_size": model.network.config.vocab_size,
        "device": str(model.device),
        "dtype": "float32",
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }


def _numbers(
    documents: DocumentSums, dataset: TokenDataset, selection: Selection
) -> dict[str, Any]:
    """Scores in total, by bucket and by domain.

    Bits per byte only where a whole domain was scored: its bytes are known only as a whole.
    """
    numbers = summarise_documents(documents, [domain.name for domain in dataset.domains])
    for domain, complete in zip(dataset.domains, selection.complete, strict=True):
        scores = numbers["domains"][domain.name]
        bits = scores["nats_per_token"] * scores["tokens"] / math.log(2)
        scores["bits_per_byte"] = bits / domain.bytes if complete and domain.bytes else None
    return numbers
