"""Writes realistic run folders without training: logs and evaluations with known gaps."""

import hashlib
import json
import math
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from megatron_infoentropy.evaluate.evaluation import FORMAT, DocumentSums, Evaluation
from megatron_infoentropy.evaluate.tally import (
    BANDS,
    BUCKETS,
    RULE,
    Tally,
    summarise_documents,
    weighted_average,
)

VOCAB = 8192
DOMAINS = {"Python documentation": 90, "Python source code": 160}
DIFFICULTY = {"high": 3.1, "medium": 6.4, "low": 8.3}  # nats per token


def write_run(
    folder: Path,
    *,
    objective: str = "cross_entropy",
    gamma: float = 1.0,
    seed: int = 1,
    name: str | None = None,
    shift: float = 0.0,
    steps: int = 400,
    evaluated: bool = True,
    fingerprint: str = "f" * 64,
    model_seed: int | None = None,
    same_as: str | None = None,
    **info,
) -> Path:
    """One run folder; `shift` moves its loss on every low-frequency token, in nats.

    Its scores are those of `model_seed` and of the objective `same_as`: by default, its own.
    """
    folder.mkdir(parents=True)
    description = {
        "name": name or folder.name,
        "objective": objective,
        "gamma": gamma,
        "sigma": 1.0,
        "normalization": "paper",
        "seed": seed,
        "tensor_parallel": 2,
        "pipeline_parallel": 1,
        "data_parallel": 1,
        "device": "cpu, 2 cores",
        "parameters": 7_342_336,
        "train_iters": 400,
        "global_batch_size": 16,
        "seq_length": 256,
        "command": ["torchrun", "--nproc-per-node", "2", "-m", "megatron_infoentropy.pretrain",
                    "--infoentropy-objective", objective, "--infoentropy-gamma", str(gamma),
                    "--seed", str(seed), "--tokenizer-model", "runs/demo data/tokenizer.json"],
        "versions": {"torch": "2.15.0", "megatron-core": "0.19.2"},
    } | info  # fmt: skip
    (folder / "run.json").write_text(json.dumps(description), encoding="utf-8")
    (folder / "train.log").write_text(training_log(objective, seed, steps), encoding="utf-8")
    if evaluated:
        scores = model_seed or seed, shift, same_as or objective
        example_evaluation(*scores, fingerprint).save(folder)
    return folder


def write_runs(folder: Path, shifts: dict[str, float], seeds: Iterable[int], **info) -> list[Path]:
    """Run folders OBJECTIVE-SEED, of every objective with its shift, and every seed."""
    return [
        write_run(folder / f"{name}-{seed}", objective=name, seed=seed, shift=shift, **info)
        for name, shift in shifts.items()
        for seed in seeds
    ]


def training_log(objective: str, seed: int, steps: int) -> str:
    """Megatron's console log of a run whose loss falls as a power law."""
    generator = np.random.default_rng([seed, len(objective)])
    lines = ["using world size: 2, data-parallel size: 1", "[before the start of training step]"]
    for step in range(10, steps + 1, 10):
        ce = 4.1 + 4.9 * (1 + step / 22) ** -0.75 + generator.normal(0, 0.03)
        weight = 1 + ce if objective == "infoentropy" else 1.0
        lines.append(
            f" [2026-11-23 05:00:00.123456] iteration {step:8d}/     400 | lr: 3.0E-04 | "
            f"objective: {1.04 * ce:.6E} | cross entropy: {ce:.6E} | weight: {weight:.6E} |"
        )
        entropies = " | ".join(f"entropy p{p}: {ce * (0.3 + p / 125):.6G}" for p in (10, 50, 90))
        lines.append(
            f" InfoEntropy at iteration {step:8d} | {entropies} | weight p50: {weight:.6G} | "
            f"weight p99: {1.8 * weight:.6G} | weight max: {2.1 * weight:.6G} |"
        )
        if step % 100 == 0:
            lines.append(
                f" validation loss at iteration {step} | cross entropy value: {ce + 0.1:.6E} | "
                f"cross entropy PPL: {math.exp(ce + 0.1):.6E} | "
            )
    return "\n".join(lines) + "\n"


def example_evaluation(seed: int, shift: float, objective: str, fingerprint: str) -> Evaluation:
    """An evaluation with the same documents for every seed, and noise of its own."""
    shared = np.random.default_rng(0)
    count = sum(DOMAINS.values())
    tokens = shared.integers(20, 900, size=(count, 1)) * np.full(BANDS, 1 / BANDS)
    tokens = tokens.astype(np.int64) + 1
    hard = shared.normal(0, 0.35, size=(count, 1)) + np.array(list(DIFFICULTY.values()))
    own = np.random.default_rng([seed, len(objective)])
    per_bucket = hard + own.normal(0, 0.08, size=(count, 3)) + own.normal(0, 0.006, size=3)
    per_bucket = per_bucket + shift * np.array([0.05, 0.4, 1.0])
    per_token = np.repeat(per_bucket, [16, 3, 1], axis=1)
    domain = np.repeat(np.arange(len(DOMAINS)), list(DOMAINS.values()))
    entropy = 0.96 * per_token * tokens
    sums = DocumentSums(domain, np.arange(count), tokens, per_token * tokens, entropy)
    scores = np.stack([per_token, 0.96 * per_token], axis=-1)
    scores = np.repeat(scores.reshape(-1, 2), tokens.ravel(), axis=0).astype(np.float16)
    tally = Tally(VOCAB)
    confidence = np.exp(-scores[:, 0].astype(np.float64) / 2)
    right = own.random(len(scores)) < confidence
    tally.add(*scores.T.astype(np.float32), confidence, right.astype(np.float32))
    return Evaluation(example_summary(sums, tally, fingerprint), sums, scores)


def example_summary(sums: DocumentSums, tally: Tally, fingerprint: str) -> dict:
    """What `compare` and the report read of an evaluation.json."""
    numbers = summarise_documents(sums, list(DOMAINS))
    for place in (numbers["total"], *numbers["domains"].values()):
        place["bits_per_byte"] = place["nats_per_token"] / math.log(2) / 3.4
    nats = {name: place["nats_per_token"] for name, place in numbers["domains"].items()}
    return {
        "format": FORMAT,
        "scoring": {
            "rule": "every token once",
            "mode": "sliding",
            "context_length": 256,
            "stride": 256,
            "batch_tokens": 4096,
        },
        "model": {"weights_sha256": hashlib.sha256(sums.ce.tobytes()).hexdigest()},
        "data": {"fingerprint": fingerprint, "complete": True},
        "bucket_rule": RULE,
        "bucket_sizes": {
            name: {"vocabulary": size, "training_share": share}
            for name, size, share in zip(BUCKETS, (812, 2604, 4776), (0.8, 0.15, 0.05), strict=True)
        },
        **numbers,
        "weighted_average": weighted_average(nats, dict.fromkeys(nats, 1.0))
        | {"weights_are": "equal"},
        "difficulty": tally.difficulty(),
        "entropy_histogram": tally.histogram(),
        "calibration": tally.calibration(),
        "passage": {
            "domain": "Python documentation",
            "document": 0,
            "start": 0,
            "text": ["def", " f", "(x", "):\n", "    return", " <b>", " & x", "\n"],
            "ce": [5.1, 6.0, 1.2, 0.4, 0.2, 7.5, 4.0, 0.1],
            "entropy": [6.1, 5.0, 1.5, 0.6, 0.3, 4.5, 4.2, 0.2],
        },
    }
