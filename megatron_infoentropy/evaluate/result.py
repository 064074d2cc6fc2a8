"""From the chunks that were scored to the evaluation: sums in their order, and the numbers."""

import hashlib
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from megatron_infoentropy.evaluate.buckets import BANDS, BUCKETS, DECILES, RULE, describe_bands
from megatron_infoentropy.evaluate.chunks import cut_chunks
from megatron_infoentropy.evaluate.evaluation import (
    FORMAT,
    TOKENS_FILE,
    DocumentSums,
    Evaluation,
)
from megatron_infoentropy.evaluate.job import Job
from megatron_infoentropy.evaluate.journal import Journal
from megatron_infoentropy.evaluate.passage import passage
from megatron_infoentropy.evaluate.selection import places_sha256
from megatron_infoentropy.evaluate.summary import (
    bits_per_byte,
    summarise_documents,
    weighted_average,
)
from megatron_infoentropy.evaluate.tally import Tally


def assemble(job: Job, journal: Journal, *, token_scores: bool) -> Evaluation:
    """The evaluation whose chunks are all in the journal.

    Raises:
        UnfinishedEvaluationError: one is missing or damaged.
    """
    selection = job.selection
    shape = len(selection), BANDS
    tokens, ce, entropy = np.zeros(shape, np.int64), np.zeros(shape), np.zeros(shape)
    tally = Tally(job.model.vocab_size)
    names = places_sha256(job.dataset, selection, job.band_of_token)
    fingerprint = hashlib.sha256(names.encode())
    path = journal.folder / TOKENS_FILE
    with path.open("wb") as file:
        _write_header(file, int(selection.length.sum()))
        for number, rows in enumerate(cut_chunks(selection, job.scoring.batch_tokens)):
            chunk = journal.read(number)
            tokens[rows], ce[rows], entropy[rows] = chunk.tokens, chunk.ce, chunk.entropy
            file.write(chunk.scores.tobytes())
            fingerprint.update(chunk.sha256.tobytes())
            tally += chunk.tally
    scores: NDArray[np.float16] = np.load(path, mmap_mode="r", allow_pickle=False)
    documents = DocumentSums(selection.domain, selection.document, tokens, ce, entropy)
    summary = {
        "format": FORMAT,
        "scoring": _describe_scoring(job),
        "model": _describe_model(job, journal),
        "data": _describe_data(job, fingerprint.hexdigest()),
        "bucket_rule": RULE,
        "bucket_sizes": describe_bands(BUCKETS, job.counts, job.band_of_token),
        "decile_sizes": describe_bands(DECILES, job.counts, job.band_of_token),
        **_numbers(job, documents),
        "difficulty": tally.difficulty(),
        "entropy_histogram": tally.histogram(),
        "calibration": tally.calibration(),
        "passage": passage(job.dataset, selection, scores, job.source.tokenizer),
    }
    return Evaluation(summary, documents, scores if token_scores else None)


def _write_header(file: BinaryIO, tokens: int) -> None:
    """Of the .npy file of float16 [tokens, 2]."""
    header = {"descr": "<f2", "fortran_order": False, "shape": (tokens, 2)}
    np.lib.format.write_array_header_1_0(file, header)


def _describe_scoring(job: Job) -> dict[str, Any]:
    scoring = job.scoring
    return {
        "rule": scoring.rule,
        "mode": "packed" if scoring.packed else "sliding",
        "context_length": scoring.context_length,
        "stride": scoring.stride,
        "batch_tokens": scoring.batch_tokens,
    }


def _describe_model(job: Job, journal: Journal) -> dict[str, Any]:
    described: dict[str, Any] = journal.plan()["model"]
    return {"kind": job.source.kind, **job.source.facts, **described}


def _describe_data(job: Job, fingerprint: str) -> dict[str, Any]:
    return {
        "fingerprint": fingerprint,
        "tokenizer_sha256": job.dataset.tokenizer_sha256,
        "complete": all(job.selection.complete),
        "documents": len(job.selection),
        "empty_documents": job.dataset.empty_documents,
        "one_token_documents": int((job.selection.length == 1).sum()),
    }


def _numbers(job: Job, documents: DocumentSums) -> dict[str, Any]:
    """Scores in total, by band and by domain, and the averages over domains.

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
