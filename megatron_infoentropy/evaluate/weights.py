"""What weight a token gets: over entropy, on the entropies a model predicts, and token by token in
a passage. The weights are those of the code that trains, `loss.weighting`."""

from collections.abc import Collection
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_infoentropy.config import InfoEntropyConfig
from megatron_infoentropy.evaluate.runs import GAMMA, SIGMA, Run, objective_in_words

# Drawn beside the gamma in use, to show what a larger or smaller one would do.
OTHER_GAMMAS = (0.5, 2.0)
LEVELS = 6  # of colour
_POINTS = 121
_LEAST_SPAN = 0.25  # of the mean weight, that the colours span: smaller differences stay pale


def weight_curves(runs: list[Run], weightings: Collection[str] = ()) -> dict[str, Any] | None:
    """Weights over entropy H at the end of each training, of mean 1 over the scored tokens.

    The tokens are those of the first evaluated InfoEntropy run, or of the first evaluated run
    where there is none; without any evaluation there is nothing to scale by and None is returned.
    Where weights depend on cross entropy too, it is the mean one of the tokens of entropy H.

    Args:
        runs: the report's runs.
        weightings: the custom weightings that may be imported and called.

    Returns:
        run: the name of that run; entropy: H in nats; curves: per curve its label, objective,
        gamma, sigma, run (the first that was trained so, by its place, or None) and the weights at
        H; histogram: as the evaluation holds it.
    """
    evaluated = [run for run in runs if run.evaluation is not None]
    if not evaluated:
        return None
    used: dict[InfoEntropyConfig, int] = {}
    for place, run in enumerate(runs):
        loss = final_loss(run)
        if loss.is_weighted and may_draw(loss, weightings):
            used.setdefault(_weight_alone(loss), place)
    drawn = [loss for loss in used if loss.objective == "infoentropy"] or [InfoEntropyConfig()]
    sigma = min(drawn, key=_order).sigma
    others = [InfoEntropyConfig(gamma=gamma, sigma=sigma) for gamma in OTHER_GAMMAS]
    losses = sorted({*used, *drawn, *others}, key=_order)
    weighted = [run for run in evaluated if final_loss(run).objective == "infoentropy"]
    source = (weighted or evaluated)[0]
    assert source.evaluation is not None
    histogram = source.evaluation.summary["entropy_histogram"]
    entropy = np.linspace(0.0, histogram["edges"][-1], _POINTS)
    return {
        "run": source.name,
        "entropy": entropy.tolist(),
        "curves": [_curve(loss, used.get(loss), entropy, histogram) for loss in losses],
        "histogram": histogram,
    }


def weigh_passage(label: str, run: Run, weightings: Collection[str] = ()) -> dict[str, Any] | None:
    """The passage of a run's evaluation with the weight of every token, of mean 1 over them.

    Returns:
        label, run, domain, document, and tokens, each with text, weight, entropy, ce and a level of
        colour from 0 to 5; None without weights, without an evaluation, and for a custom weighting
        that may not be called.
    """
    loss = final_loss(run)
    if run.evaluation is None or not loss.is_weighted or not may_draw(loss, weightings):
        return None
    passage = run.evaluation.summary["passage"]
    weight = weigh(loss, passage["ce"], passage["entropy"])
    weight /= weight.mean() or 1.0
    span = max(float(np.ptp(weight)), _LEAST_SPAN)
    level = np.minimum(LEVELS * (weight - weight.min()) / span, LEVELS - 1).astype(int)
    columns = {
        "text": passage["text"],
        "weight": weight.tolist(),
        "entropy": passage["entropy"],
        "ce": passage["ce"],
        "level": level.tolist(),
    }
    tokens = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    place = {name: passage[name] for name in ("domain", "document")}
    return {"label": label, "run": run.name, **place, "tokens": tokens}


def final_loss(run: Run) -> InfoEntropyConfig:
    """The loss of a run's last step: a schedule of gamma has come so far."""
    steps = run.log.last_iteration or int(run.info["train_iters"])
    return run.loss.at(steps * int(run.info["global_batch_size"])).effective()


def may_draw(loss: InfoEntropyConfig, weightings: Collection[str]) -> bool:
    """Whether weights can be had without code that a file names and the user does not."""
    if loss.objective in ("eslm", "entrodrop"):
        return False  # those compare the tokens of a micro-batch, which is not at hand
    return loss.objective != "custom" or loss.weighting in weightings


def weigh(loss: InfoEntropyConfig, ce: Any, entropy: Any) -> NDArray[np.float64]:
    """The weight that a training gives to tokens of these statistics, before normalisation."""
    import torch

    from megatron_infoentropy.loss.statistics import TokenStatistics
    from megatron_infoentropy.loss.token_batch import token_batch
    from megatron_infoentropy.loss.weighting import token_weight

    known = [torch.tensor(np.maximum(each, 0.0), dtype=torch.float64) for each in (ce, entropy)]
    unused = torch.zeros_like(known[0])  # by any weight
    statistics = TokenStatistics(known[0], known[1], unused, unused.bool())
    with torch.no_grad():
        weight = token_weight(token_batch(statistics), replace(loss, detach_weight=True))
    return np.asarray(weight.numpy(), dtype=np.float64)


def _weight_alone(loss: InfoEntropyConfig) -> InfoEntropyConfig:
    """The same weights, with everything else at its default."""
    names = ("objective", "gamma", "sigma", "blend", "weighting")
    return InfoEntropyConfig(**{name: getattr(loss, name) for name in names})


def _order(loss: InfoEntropyConfig) -> tuple[Any, ...]:
    return loss.objective != "infoentropy", loss.objective, loss.gamma, loss.sigma, loss.blend


def _curve(
    loss: InfoEntropyConfig,
    place: int | None,
    entropy: NDArray[np.float64],
    histogram: dict[str, Any],
) -> dict[str, Any]:
    filled = [i for i, tokens in enumerate(histogram["tokens"]) if tokens]
    tokens, occurring, mean_ce = (
        np.array([histogram[name][i] for i in filled], dtype=float)
        for name in ("tokens", "mean_entropy", "mean_ce")
    )
    # At once: a weighting of one's own may look at all tokens.
    ce = np.interp(entropy, occurring, mean_ce)
    weight = weigh(loss, np.append(mean_ce, ce), np.append(occurring, entropy))
    mean = float((weight[: len(tokens)] * tokens).sum() / tokens.sum())
    label = f"{GAMMA} = {loss.gamma:g}" + (f", {SIGMA} = {loss.sigma:g}" if loss.sigma != 1 else "")
    return {
        "label": label if loss == _plain(loss) else objective_in_words(loss.effective()),
        "objective": loss.objective,
        "gamma": loss.gamma,
        "sigma": loss.sigma,
        "run": place,
        "weight": (weight[len(tokens) :] / (mean or 1.0)).tolist(),
    }


def _plain(loss: InfoEntropyConfig) -> InfoEntropyConfig:
    return InfoEntropyConfig(gamma=loss.gamma, sigma=loss.sigma)
