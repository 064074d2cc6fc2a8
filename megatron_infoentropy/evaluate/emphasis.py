"""A passage token by token: which of its tokens an objective emphasises, by the trained model."""

import math
from typing import Any

from megatron_infoentropy.evaluate.runs import Run

LEVELS = 6  # of colour
_LEAST_SPAN = 0.25  # of the mean weight, that the colours span: smaller differences stay pale


def emphasise(label: str, run: Run) -> dict[str, Any] | None:
    """The passage of a run's evaluation with the weight of every token, of mean 1 over them.

    Returns:
        label, run, domain, document, and tokens, each with text, weight, entropy, ce and a level of
        colour from 0 to 5; None for objectives whose weights are not known here, and without an
        evaluation.
    """
    weigh = {"infoentropy": _infoentropy, "focal": _focal}.get(run.info["objective"])
    if weigh is None or run.evaluation is None or run.is_baseline:
        return None
    passage = run.evaluation.summary["passage"]
    gamma, sigma = float(run.info["gamma"]), float(run.info["sigma"])
    pairs = list(zip(passage["ce"], passage["entropy"], strict=True))
    weights = [weigh(ce, entropy, gamma, sigma) for ce, entropy in pairs]
    mean = sum(weights) / len(weights) or 1.0
    least = min(weights)
    span = max(max(weights) - least, _LEAST_SPAN * mean)
    tokens = [
        {
            "text": text,
            "weight": weight / mean,
            "entropy": entropy,
            "ce": ce,
            "level": min(int(LEVELS * (weight - least) / span), LEVELS - 1),
        }
        for text, weight, (ce, entropy) in zip(passage["text"], weights, pairs, strict=True)
    ]
    place = {name: passage[name] for name in ("domain", "document")}
    return {"label": label, "run": run.name, **place, "tokens": tokens}


def _infoentropy(ce: float, entropy: float, gamma: float, sigma: float) -> float:
    return math.pow(sigma + max(entropy, 0.0), gamma)


def _focal(ce: float, entropy: float, gamma: float, sigma: float) -> float:
    return math.pow(1 - math.exp(-max(ce, 0.0)), gamma)
