"""Scoring a model: by domain, by how frequent and how hard a token is, and how well calibrated.

Steps: check that model, data and token counts speak of the same vocabulary; cut the documents into
chunks, which are scored by turns of the ranks and written down one by one; add the chunks up in
their order; turn the sums into numbers. Always plain cross entropy, whatever objective the model
was trained with. In memory are one chunk of tokens, one batch of logits, and 900 bytes a document.
"""

import hashlib
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from megatron_infoentropy.data.tokenizer import TOKENIZER
from megatron_infoentropy.evaluate.dataset import (
    TokenDataset,
    domain_weights,
    open_dataset,
    select_documents,
)
from megatron_infoentropy.evaluate.evaluation import (
    FORMAT,
    SUMMARY_FILE,
    TOKENS_FILE,
    DocumentSums,
    Evaluation,
    load_evaluation,
)
from megatron_infoentropy.evaluate.model import (
    ModelSource,
    Ranks,
    choose_device,
    context_length_of,
    hugging_face,
    joined_ranks,
    load_model,
    require_same_tokenizer,
    require_same_vocabulary,
)
from megatron_infoentropy.evaluate.scoring import ChunkJournal, Scoring, ScoringJob, score_chunk
from megatron_infoentropy.evaluate.tally import (
    BANDS,
    BUCKETS,
    DECILES,
    RULE,
    Tally,
    bits_per_byte,
    describe_bands,
    frequency_bands,
    read_token_counts,
    summarise_documents,
    weighted_average,
)
from megatron_infoentropy.progress import progress

_PASSAGE_TOKENS = 256


@dataclass(frozen=True)
class ScoringOptions:
    """How a model is scored.

    Attributes:
        context_length: tokens that a window reads; None: the model's positions.
        stride: tokens that a window scores; None: the context length.
        packed: let documents of a domain follow one another in a window, as in training.
        batch_tokens: tokens read at once; the logits of a batch take 4 bytes x this x vocabulary.
        max_tokens: score a fixed sample of about this many tokens instead of everything.
        domain_weights: of the weighted average, see `dataset.domain_weights`.
        dtype: of weights and activations; scores are fp32 in any case.
        device: torch device, or "auto" for the first GPU, else the CPU.
    """

    context_length: int | None = None
    stride: int | None = None
    packed: bool = False
    batch_tokens: int = 4096
    max_tokens: int | None = None
    domain_weights: str = "auto"
    dtype: str = "float32"
    device: str = "auto"


def evaluate_model(
    model: Path | ModelSource,
    data: Path | Mapping[str, Path],
    options: ScoringOptions | None = None,
    *,
    token_counts: Path,
    output: Path,
    restart: bool = False,
    overwrite: bool = False,
) -> Evaluation:
    """Score a model on a token dataset; started by torchrun, all its processes take part.

    Args:
        model: a Hugging Face folder, or where else a model comes from; nothing is fetched.
        data: folder with manifest.json and one .bin/.idx a domain, or such folders of one domain
            each, by the name that it shall have.
        options: how.
        token_counts: token_counts.npy of the *training* data, which defines the buckets.
        output: folder to write the evaluation into, which an interrupted one resumes from, and
            which several processes share.
        restart: discard what an interrupted evaluation has left in `output`.
        overwrite: replace a finished evaluation in `output`, once the new one is whole.

    Returns:
        The evaluation, the same on every process; what it holds is said in `evaluation`.

    Raises:
        UnfinishedEvaluationError: another evaluation was interrupted in `output`, or a part of this
            one is damaged.
        ValueError: what does not fit, such as another tokenizer or a longer context.
    """
    if (output / SUMMARY_FILE).exists() and not overwrite:
        raise ValueError(
            f"{output} holds a finished evaluation: name another --output, or --overwrite to "
            "replace it"
        )
    source = hugging_face(model) if isinstance(model, Path) else model
    with joined_ranks() as ranks:
        job = open_job(source, data, token_counts, options or ScoringOptions())
        journal = ChunkJournal(output)
        _score(job, ranks, journal, restart=restart)
        if ranks.rank == 0:
            assemble(job, journal).save(output)
            journal.finish()
        ranks.wait()
        return load_evaluation(output)


def open_job(
    source: ModelSource,
    data: Path | Mapping[str, Path],
    token_counts: Path,
    options: ScoringOptions,
) -> ScoringJob:
    """Open model and data, cheap checks first.

    Raises:
        ValueError: what does not fit.
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
    scoring = _scoring(dataset, context_length_of(model, options.context_length), options)
    return ScoringJob(
        model, source, dataset, selection, scoring, counts, band_of_token, weights, weights_are
    )


def _scoring(dataset: TokenDataset, context_length: int, options: ScoringOptions) -> Scoring:
    stride = context_length if options.stride is None else options.stride
    if not 1 <= stride <= context_length:
        raise ValueError(
            f"stride must be between 1 and the context length {context_length}, got {stride}: "
            "with a larger one tokens would be left out"
        )
    return Scoring(
        context_length,
        stride,
        options.packed,
        options.batch_tokens,
        dataset.context,
        behind_start=any(domain.skipped for domain in dataset.domains),
    )


def _score(job: ScoringJob, ranks: Ranks, journal: ChunkJournal, *, restart: bool) -> None:
    """Score this rank's chunks that are not in the journal yet; return when all ranks have."""
    if ranks.rank == 0:
        journal.start(job.plan, restart=restart)
    ranks.wait()
    mine = [n for n in range(ranks.rank, len(job.chunks), ranks.size) if not journal.has(n)]
    tokens = sum(int(job.selection.length[job.chunks[number]].sum()) for number in mine)
    silent = nullcontext(lambda work: None)
    with progress("scoring", tokens, "tokens") if ranks.rank == 0 else silent as advance:
        for number in mine:
            journal.write(number, score_chunk(job, job.chunks[number], advance))
    ranks.wait()


def assemble(job: ScoringJob, journal: ChunkJournal) -> Evaluation:
    """Return the evaluation whose chunks are all in the journal.

    Raises:
        UnfinishedEvaluationError: one is missing or damaged.
    """
    selection = job.selection
    shape = len(selection), BANDS
    tokens, ce, entropy = np.zeros(shape, np.int64), np.zeros(shape), np.zeros(shape)
    tally = Tally(job.model.vocab_size)
    fingerprint = hashlib.sha256(job.plan["documents"].encode())
    path = journal.folder / TOKENS_FILE
    header = {"descr": "<f2", "fortran_order": False, "shape": (int(selection.length.sum()), 2)}
    with path.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
        for number, rows in enumerate(job.chunks):
            lengths, ids = selection.length[rows], selection.read(job.dataset, rows)
            chunk = journal.read(number, int(lengths.sum()))
            bands = job.band_of_token[np.concatenate(ids)]
            tokens[rows] = _by_band(lengths, bands)
            ce[rows], entropy[rows] = (_by_band(lengths, bands, sums) for sums in chunk[:2])
            held = np.minimum(chunk[:2].T, np.finfo(np.float16).max)  # a diverged model's are more
            file.write(held.astype(np.float16).tobytes())
            for document in ids:
                fingerprint.update(hashlib.sha256(document.astype("<i4").tobytes()).digest())
            tally.add(*chunk)
    scores: NDArray[np.float16] = np.load(path, mmap_mode="r", allow_pickle=False)
    documents = DocumentSums(selection.domain, selection.document, tokens, ce, entropy)
    summary = {
        **_description(job, fingerprint.hexdigest()),
        **_numbers(job, documents),
        "difficulty": tally.difficulty(),
        "entropy_histogram": tally.histogram(),
        "calibration": tally.calibration(),
        "passage": _passage(job, scores),
    }
    return Evaluation(summary, documents, scores)


def _by_band(
    lengths: NDArray[np.int64], bands: NDArray[np.int8], values: NDArray[np.float32] | None = None
) -> NDArray[Any]:
    """Return the sums [documents, bands] of the documents' numbers a token, else counts."""
    cell = np.repeat(np.arange(len(lengths)) * BANDS, lengths) + bands
    sums = np.bincount(cell, weights=values, minlength=len(lengths) * BANDS)
    return sums.reshape(len(lengths), BANDS)


def _description(job: ScoringJob, fingerprint: str) -> dict[str, Any]:
    """Describe what was scored, with what, and how."""
    scoring = job.scoring
    return {
        "format": FORMAT,
        "scoring": {
            "rule": scoring.rule,
            "mode": "packed" if scoring.packed else "sliding",
            "context_length": scoring.context_length,
            "stride": scoring.stride,
            "batch_tokens": scoring.batch_tokens,
        },
        "model": {"kind": job.source.kind, **job.source.facts, **job.plan["model"]},
        "data": {
            "fingerprint": fingerprint,
            "tokenizer_sha256": job.dataset.tokenizer_sha256,
            "complete": all(job.selection.complete),
            "documents": len(job.selection),
            "empty_documents": job.dataset.empty_documents,
            "one_token_documents": int((job.selection.length == 1).sum()),
        },
        "bucket_rule": RULE,
        "bucket_sizes": describe_bands(BUCKETS, job.counts, job.band_of_token),
        "decile_sizes": describe_bands(DECILES, job.counts, job.band_of_token),
    }


def _numbers(job: ScoringJob, documents: DocumentSums) -> dict[str, Any]:
    """Return scores in total, by band and by domain, and the averages over domains.

    Bits per byte only where a whole domain was scored: its bytes are known only as a whole.
    """
    domains = job.dataset.domains
    numbers = summarise_documents(documents, [domain.name for domain in domains])
    for domain, complete in zip(domains, job.selection.complete, strict=True):
        scores = numbers["domains"][domain.name]
        scores["bits_per_byte"] = bits_per_byte(scores, domain.bytes) if complete else None
    whole = all(job.selection.complete)
    every_byte = sum(domain.bytes for domain in domains) if whole else 0
    numbers["total"]["bits_per_byte"] = bits_per_byte(numbers["total"], every_byte)
    nats = {name: scores["nats_per_token"] for name, scores in numbers["domains"].items()}
    average = weighted_average(nats, job.weights) | {"weights_are": job.weights_are}
    return numbers | {"weighted_average": average}


def _passage(job: ScoringJob, scores: NDArray[np.float16]) -> dict[str, Any]:
    """Return the start of the first document of 256 tokens, or of the longest, with its scores.

    So it is the same for every model that scores the data.
    """
    selection = job.selection
    row = int(np.argmax(np.minimum(selection.length, _PASSAGE_TOKENS)))
    length = min(int(selection.length[row]), _PASSAGE_TOKENS)
    first = int(selection.length[:row].sum())
    domain = job.dataset.domains[selection.domain[row]]
    tokens = domain.read(int(selection.document[row]), length).tolist()
    ce, entropy = np.round(scores[first : first + length].astype(np.float64), 4).T
    return {
        "domain": domain.name,
        "document": int(selection.document[row]),
        "start": 0,
        "text": _pieces(Tokenizer.from_file(str(job.source.tokenizer / TOKENIZER)), tokens),
        "ce": ce.tolist(),
        "entropy": entropy.tolist(),
    }


def _pieces(tokenizer: Tokenizer, tokens: list[int]) -> list[str]:
    """Return what each token adds to the text: nothing yet where it ends inside a character."""
    pieces: list[str] = []
    shown = ""
    for count in range(1, len(tokens) + 1):
        text = tokenizer.decode(tokens[:count], skip_special_tokens=False)
        whole = text.rstrip("\N{REPLACEMENT CHARACTER}")
        pieces.append(whole[len(shown) :] if whole.startswith(shown) else "")
        shown = whole if whole.startswith(shown) else shown
    return pieces
