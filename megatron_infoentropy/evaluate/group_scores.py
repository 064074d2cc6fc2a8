"""Scores of a setting: means over its seeds, and how far other documents would move them."""

import math
from typing import Any

import numpy as np

from megatron_infoentropy.evaluate.buckets import BANDS_OF, BUCKETS
from megatron_infoentropy.evaluate.evaluation import Evaluation

AVERAGES = ("weighted_average", "uniform_average", "worst_case")
_FEWEST_DOCUMENTS = 8
_STANDARD_ERRORS = 1.96  # to either side of 95 % of a normal distribution


def intervals_over_documents(evaluations: list[Evaluation]) -> dict[str, tuple[float, float]]:
    """95 % intervals of nats per token over documents, of all tokens and of the buckets.

    By the variance of a ratio of sums over documents, the sums being means over the evaluations.
    Far wider than those of paired differences: what makes a document hard does not cancel.
    """
    if len({evaluation.fingerprint for evaluation in evaluations}) != 1:
        return {}
    every_token = evaluations[0].documents.tokens
    every_ce = np.mean([evaluation.documents.ce for evaluation in evaluations], axis=0)
    found = {}
    for name in ("all tokens", *BUCKETS):
        bands = BANDS_OF.get(name, slice(None))
        tokens, ce = every_token[:, bands].sum(axis=1), every_ce[:, bands].sum(axis=1)
        documents = int((tokens > 0).sum())
        if documents < _FEWEST_DOCUMENTS:
            continue
        nats = ce.sum() / tokens.sum()
        squares = float(((ce - nats * tokens) ** 2).sum()) * documents / (documents - 1)
        reach = _STANDARD_ERRORS * math.sqrt(squares) / float(tokens.sum())
        found[name] = (float(nats) - reach, float(nats) + reach)
    return found


def mean_scores(evaluations: list[Evaluation]) -> dict[str, Any]:
    """Means over evaluations of one setting: {"domains": {name: scores}, average: scores}.

    Scores are nats_per_token, perplexity (of the mean nats) and bits_per_byte, None where unknown.
    """
    if not evaluations:
        return {"domains": {}, **dict.fromkeys(AVERAGES)}
    summaries = [evaluation.summary for evaluation in evaluations]
    domains = {name: None for summary in summaries for name in summary["domains"]}
    return {
        "domains": {
            name: _mean([s["domains"][name] for s in summaries if name in s["domains"]])
            for name in domains
        },
        **{name: _mean([s[name] for s in summaries if name in s]) for name in AVERAGES},
    }


def _mean(scores: list[dict[str, Any]]) -> dict[str, Any] | None:
    nats = [score["nats_per_token"] for score in scores if score["nats_per_token"] is not None]
    if not nats:
        return None
    mean = sum(nats) / len(nats)
    bits = [score.get("bits_per_byte") for score in scores]
    known = [one for one in bits if one is not None]
    return {
        "nats_per_token": mean,
        "perplexity": math.exp(mean) if mean < 700 else None,
        "bits_per_byte": sum(known) / len(known) if known and len(known) == len(bits) else None,
        "documents": scores[0].get("documents"),
        "tokens": scores[0].get("tokens"),
        "domain": scores[0].get("domain"),
    }
