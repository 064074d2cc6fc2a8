"""The result of scoring one model, and its files, all in one folder.

evaluation.json, the numbers a reader wants (nats are natural; None where there are no tokens):

    format            2
    scoring           rule (a sentence), mode ("sliding" or "packed"), context_length, stride,
                      batch_tokens
    model             kind ("huggingface" or "megatron"), class, parameters, vocab_size, device,
                      dtype, weights_sha256, versions; iteration of a Megatron checkpoint
    data              fingerprint, tokenizer_sha256, complete (all documents whole), documents,
                      empty_documents (left out), one_token_documents
    bucket_rule       a sentence; bucket_sizes and decile_sizes: {name: vocabulary, training_share}
    total             M + documents, bits_per_byte          M = tokens, nats_per_token, perplexity,
    buckets           {high, medium, low: M}                    mean_entropy
    deciles           {"1" ... "10": M}
    domains           {name: M + documents, bits_per_byte, buckets: {high, medium, low: M}}
    weighted_average  nats_per_token, perplexity, weights: {domain: share}, weights_are (a sentence)
    uniform_average   nats_per_token, perplexity
    worst_case        nats_per_token, perplexity, domain
    difficulty        rule, buckets: {easy, medium, hard: M + entropy_from, entropy_to}: thirds of
                      the tokens by this model's own entropy
    entropy_histogram edges [65], tokens, mean_ce, mean_entropy [64]: 64 equal bins up to ln V
    calibration       of the most probable token: accuracy, mean_confidence, expected_error (ECE),
                      edges [21], tokens, accuracy_in_bin, confidence_in_bin [20]
                      of the entropy: entropy_error, the mean over tokens of |mean_ce -
                      mean_entropy| in the 64 bins
    passage           domain, document, start, and of each of its first tokens: text, ce, entropy
    files             {name: sha256} of the arrays below

evaluation.npz, sums per document and frequency band, see `DocumentSums`; token_scores.npy, cross
entropy and entropy of every scored token, float16 [tokens, 2] (65504 where a diverged model has
more), documents in the order of evaluation.npz. evaluation.json is written last and names the
others' checksums, so files of different evaluations are never taken together.
"""

import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_infoentropy.files import file_sha256, write_atomically, write_whole

FORMAT = 2
SUMMARY_FILE = "evaluation.json"
DOCUMENTS_FILE = "evaluation.npz"
TOKENS_FILE = "token_scores.npy"
_ARRAYS = (DOCUMENTS_FILE, TOKENS_FILE)
UNFINISHED = "evaluation.unfinished"  # a folder: what an interrupted evaluation has done


class UnfinishedEvaluationError(ValueError):
    """An evaluation that was interrupted, or one of other inputs that lies in the way."""


@dataclass(frozen=True)
class DocumentSums:
    """Sums over the scored tokens of every document, in the order they were selected.

    D documents, B = `tally.BANDS` frequency bands:
        domain: index into the evaluation's domains, int64 [D].
        document: index in the domain's dataset, int64 [D].
        tokens: scored tokens, int64 [D, B].
        ce: sum of cross entropies in nats, float64 [D, B].
        entropy: sum of predicted entropies in nats, float64 [D, B].
    """

    domain: NDArray[np.int64]
    document: NDArray[np.int64]
    tokens: NDArray[np.int64]
    ce: NDArray[np.float64]
    entropy: NDArray[np.float64]


@dataclass(frozen=True)
class Evaluation:
    """Numbers (`summary`, what evaluation.json holds) and the sums per document behind them.

    `token_scores` is float16 [tokens, 2], read from disk as it is used.
    """

    summary: dict[str, Any]
    documents: DocumentSums
    token_scores: NDArray[np.float16]

    @property
    def fingerprint(self) -> str:
        """Return the hash of the scored tokens and bands: equal where evaluations can be paired."""
        return str(self.summary["data"]["fingerprint"])

    @property
    def domains(self) -> list[str]:
        return list(self.summary["domains"])

    def save(self, folder: Path) -> Path:
        """Write the files into a folder; return the path of evaluation.json, written last."""
        (folder / SUMMARY_FILE).unlink(missing_ok=True)  # of an earlier one: no longer whole
        with write_atomically(folder / DOCUMENTS_FILE) as temporary, temporary.open("wb") as file:
            np.savez_compressed(file, **vars(self.documents))
        with write_atomically(folder / TOKENS_FILE) as temporary, temporary.open("wb") as file:
            np.save(file, self.token_scores)
        checksums = {name: file_sha256(folder / name) for name in _ARRAYS}
        text = json.dumps(self.summary | {"files": checksums}, indent=2, allow_nan=False)
        write_whole(folder / SUMMARY_FILE, text + "\n")
        return folder / SUMMARY_FILE


def load_evaluation(folder: Path) -> Evaluation:
    """Read what `Evaluation.save` wrote.

    Raises:
        UnfinishedEvaluationError: an evaluation was interrupted here and has no result yet.
        ValueError: a file is missing or damaged, of another format, or the files
            are not of one evaluation.
    """
    advice = "run `infoentropy evaluate` again"
    if (folder / UNFINISHED).is_dir() and not (folder / SUMMARY_FILE).is_file():
        raise UnfinishedEvaluationError(
            f"the evaluation in {folder} was interrupted before it had scored everything, and a "
            "part is no result: repeat its `infoentropy evaluate`, which resumes"
        )
    try:
        summary = json.loads((folder / SUMMARY_FILE).read_text(encoding="utf-8"))
        if summary.get("format") != FORMAT:
            raise ValueError(f"format {summary.get('format')!r}, expected {FORMAT}")
        for name in _ARRAYS:
            if file_sha256(folder / name) != summary["files"][name]:
                raise ValueError(f"{SUMMARY_FILE} and {name} belong to different evaluations")
        with np.load(folder / DOCUMENTS_FILE, allow_pickle=False) as arrays:
            documents = DocumentSums(**{f.name: arrays[f.name] for f in fields(DocumentSums)})
        token_scores = np.load(folder / TOKENS_FILE, mmap_mode="r", allow_pickle=False)
        if token_scores.shape != (int(documents.tokens.sum()), 2):
            raise ValueError(f"{TOKENS_FILE} has shape {token_scores.shape}, of another evaluation")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"no readable evaluation in {folder}: {error}; {advice}") from error
    return Evaluation(summary, documents, token_scores)
