"""What weight a token gets for its entropy, on the entropies a model really predicts."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_infoentropy.evaluate.runs import Run
from megatron_infoentropy.evaluate.stages import GAMMA, SIGMA

# Drawn beside the gamma in use, to show what a larger or smaller one would do.
OTHER_GAMMAS = (0.5, 2.0)
_POINTS = 121


def weight_curves(runs: list[Run]) -> dict[str, Any] | None:
    """Weights (sigma + H)^gamma over entropy H, scaled to a mean of 1 over the scored tokens.

    The tokens are those of the first evaluated InfoEntropy run, or of the first evaluated run
    where there is none; without any evaluation there is nothing to scale by and None is returned.

    Returns:
        run: the name of that run; entropy: H in nats; curves: per curve its label, gamma, sigma and
        the weights at H; histogram: as the evaluation holds it.
    """
    evaluated = [run for run in runs if run.evaluation is not None]
    if not evaluated:
        return None
    weighted = [
        run for run in runs if run.info["objective"] == "infoentropy" and not run.is_baseline
    ]
    source = next((run for run in evaluated if run in weighted), evaluated[0])
    assert source.evaluation is not None
    histogram = source.evaluation.summary["entropy_histogram"]
    entropy = np.linspace(0.0, histogram["edges"][-1], _POINTS)
    return {
        "run": source.name,
        "entropy": entropy.tolist(),
        "curves": [_curve(entropy, histogram, *exponent) for exponent in _exponents(weighted)],
        "histogram": histogram,
    }


def _exponents(weighted: list[Run]) -> list[tuple[float, float]]:
    """Gamma and sigma of every curve: those the runs used (else the published), and the others."""
    used = {(float(run.info["gamma"]), float(run.info["sigma"])) for run in weighted}
    used = used or {(1.0, 1.0)}
    sigma = min(used)[1]
    return sorted(used | {(gamma, sigma) for gamma in OTHER_GAMMAS})


def _curve(
    entropy: NDArray[np.float64], histogram: dict[str, Any], gamma: float, sigma: float
) -> dict[str, Any]:
    filled = [i for i, tokens in enumerate(histogram["tokens"]) if tokens]
    tokens = np.array([histogram["tokens"][i] for i in filled], dtype=float)
    occurring = np.array([histogram["mean_entropy"][i] for i in filled])
    mean = float(((sigma + occurring) ** gamma * tokens).sum() / tokens.sum())
    return {
        "label": f"{GAMMA} = {gamma:g}" + (f", {SIGMA} = {sigma:g}" if sigma != 1 else ""),
        "gamma": gamma,
        "sigma": sigma,
        "weight": ((sigma + entropy) ** gamma / mean).tolist(),
    }
