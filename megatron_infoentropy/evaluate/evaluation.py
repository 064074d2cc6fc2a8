"""The result of scoring one model, and its two files.

`evaluation.json` holds the numbers a reader wants; `evaluation.npz` the sums per document and
bucket behind them, from which two evaluations of the same tokens can be compared pair by pair.
"""

import json
import math
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_infoentropy.evaluate.buckets import BUCKETS
from megatron_infoentropy.evaluate.errors import EvaluationFormatError
from megatron_infoentropy.evaluate.files import write_atomically

FORMAT = 1
SUMMARY_FILE = "evaluation.json"
DOCUMENTS_FILE = "evaluation.npz"


@dataclass(frozen=True)
class DocumentSums:
    """Sums over the scored tokens of every document, in the order they were selected.

    D documents, B frequency buckets (in the order of `buckets.BUCKETS`):
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
    """Numbers (`summary`, what evaluation.json holds) and the sums per document behind them."""

    summary: dict[str, Any]
    documents: DocumentSums

    @property
    def fingerprint(self) -> str:
        """Hash of the scored tokens and their buckets: equal for evaluations that can be paired."""
        return str(self.summary["data"]["fingerprint"])

    @property
    def domains(self) -> list[str]:
        return list(self.summary["domains"])

    def save(self, folder: Path) -> Path:
        """Write both files into a folder; returns the path of evaluation.json, written last."""
        arrays = asdict(self.documents) | {"fingerprint": np.array(self.fingerprint)}
        with write_atomically(folder / DOCUMENTS_FILE) as temporary, temporary.open("wb") as file:
            np.savez_compressed(file, **arrays)
        with write_atomically(folder / SUMMARY_FILE) as temporary:
            text = json.dumps(self.summary, indent=2, allow_nan=False)
            temporary.write_text(text + "\n", encoding="utf-8")
        return folder / SUMMARY_FILE


def load_evaluation(folder: Path) -> Evaluation:
    """Read what `Evaluation.save` wrote.

    Raises:
        EvaluationFormatError: a file is missing or damaged, of another format, or the two files
            are not of one evaluation.
    """
    advice = "run `infoentropy evaluate` again"
    try:
        summary = json.loads((folder / SUMMARY_FILE).read_text(encoding="utf-8"))
        with np.load(folder / DOCUMENTS_FILE, allow_pickle=False) as arrays:
            documents = DocumentSums(**{f.name: arrays[f.name] for f in fields(DocumentSums)})
            fingerprint = str(arrays["fingerprint"])
    except (OSError, ValueError, KeyError) as error:
        raise EvaluationFormatError(
            f"no readable evaluation in {folder}: {error}; {advice}"
        ) from error
    if summary.get("format") != FORMAT:
        raise EvaluationFormatError(
            f"{folder / SUMMARY_FILE} has format {summary.get('format')!r}, expected {FORMAT}; "
            f"{advice}"
        )
    if summary["data"]["fingerprint"] != fingerprint:
        raise EvaluationFormatError(
            f"{SUMMARY_FILE} and {DOCUMENTS_FILE} in {folder} belong to different evaluations; "
            f"{advice}"
        )
    return Evaluation(summary, documents)


def measures(tokens: int, ce_sum: float, entropy_sum: float) -> dict[str, Any]:
    """The numbers reported for any set of tokens; None where the set is empty."""
    nats = ce_sum / tokens if tokens else None
    return {
        "tokens": tokens,
        "nats_per_token": nats,
        "perplexity": None if nats is None else math.exp(nats),
        "mean_entropy": entropy_sum / tokens if tokens else None,
    }


def summarise_documents(documents: DocumentSums, domains: list[str]) -> dict[str, Any]:
    """Total, buckets, domains (each with its buckets) and the uniform average over domains."""

    def of(rows: NDArray[np.bool_] | slice, bucket: int | slice = slice(None)) -> dict[str, Any]:
        parts = (documents.tokens, documents.ce, documents.entropy)
        tokens, ce, entropy = (part[rows, bucket].sum() for part in parts)
        return measures(int(tokens), float(ce), float(entropy))

    by_domain = {}
    for index, name in enumerate(domains):
        rows = documents.domain == index
        in_buckets = {bucket: of(rows, b) for b, bucket in enumerate(BUCKETS)}
        by_domain[name] = of(rows) | {"documents": int(rows.sum()), "buckets": in_buckets}
    everything = slice(None)
    mean_nats = sum(domain["nats_per_token"] for domain in by_domain.values()) / len(by_domain)
    return {
        "total": of(everything) | {"documents": len(documents.domain)},
        "buckets": {bucket: of(everything, b) for b, bucket in enumerate(BUCKETS)},
        "domains": by_domain,
        "uniform_average": {"nats_per_token": mean_nats, "perplexity": math.exp(mean_nats)},
    }
