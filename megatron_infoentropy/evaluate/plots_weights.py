"""Figures of weights and of calibration: what a token weighs, and whether entropy means doubt."""

from itertools import cycle

from matplotlib.axes import Axes

from megatron_infoentropy.evaluate.figure import Cell, Figure
from megatron_infoentropy.evaluate.plot_parts import (
    DASHES,
    Data,
    color_of,
    evaluated_groups,
    first_evaluation,
    histogram_behind,
    legend,
    named,
)
from megatron_infoentropy.evaluate.svg import INK, MUTED, SERIES, draw

_ENOUGH = 30  # tokens in a bin, for a mean


def weight_curves(data: Data) -> Figure | None:
    """Weight of a token by its entropy, over the histogram of the entropies that occur."""
    weights = data["weights"]
    if weights is None:
        return None

    def plot(axes: Axes) -> str:
        histogram_behind(axes, weights["histogram"])
        others = cycle(DASHES[1:])
        for curve in weights["curves"]:
            used = curve["run"] is not None  # else one to compare with
            group = data["groups"][data["runs"][curve["run"]]["group"]] if used else None
            color, dash = (color_of(group), "solid") if group else (INK, next(others))
            width = 2.4 if group else 1.3
            label = curve["label"] + (" (used)" if group else "")
            axes.plot(weights["entropy"], curve["weight"], color=color, linestyle=dash,
                      linewidth=width, label=label)  # fmt: skip
        axes.axhline(1, color=SERIES[0], linewidth=1.4, label="cross entropy")
        axes.set(xlabel="entropy of the prediction (nats)", ylabel="weight (mean 1)")
        axes.set_xlim(0, weights["entropy"][-1])
        axes.set_ylim(bottom=0)
        legend(axes, "upper left")
        return (
            "Weight against entropy for several gamma, over the histogram of predicted entropies."
        )

    rows: list[list[Cell]] = [
        [curve["label"], entropy, weight]
        for curve in weights["curves"]
        for entropy, weight in zip(weights["entropy"], curve["weight"], strict=True)
    ]
    svg = draw("weights", plot)
    return Figure("weights", svg, ("curve", "entropy_nats", "weight_mean_1"), rows)


def entropy_calibration(data: Data) -> Figure | None:
    """Mean cross entropy of the tokens in every bin of predicted entropy, first run of a group."""
    groups = evaluated_groups(data)
    if not groups:
        return None
    found = [(g, first_evaluation(data, g)["entropy_histogram"]) for g in groups]
    points = [(g, *_filled(h, max(_ENOUGH, sum(h["tokens"]) // 2000))) for g, h in found]

    def plot(axes: Axes) -> str:
        histogram_behind(axes, found[0][1])
        for group, x, y in points:
            axes.plot(x, y, color=color_of(group), label=named(group))
        top = max([0.0, *(value for _, x, y in points for value in (*x, *y))])
        axes.plot([0, top], [0, top], color=MUTED, linestyle=DASHES[2], label="entropy itself")
        axes.set(xlabel="entropy of the prediction (nats)", ylabel="mean cross entropy (nats)")
        axes.set_xlim(0, found[0][1]["edges"][-1])
        axes.set_ylim(bottom=0)
        legend(axes, "upper left")
        return "Mean cross entropy against predicted entropy; on the diagonal they are equal."

    rows: list[list[Cell]] = [
        [group["label"], entropy, ce]
        for group, x, y in points
        for entropy, ce in zip(x, y, strict=True)
    ]
    columns = ("setting", "mean_entropy", "mean_cross_entropy")
    return Figure("calibration", draw("calibration", plot), columns, rows)


def confidence_calibration(data: Data) -> Figure | None:
    """How often the most probable token is right, by its probability, first run of a group."""
    groups = evaluated_groups(data)
    if not groups:
        return None
    found = [(group, first_evaluation(data, group)["calibration"]) for group in groups]
    rows: list[list[Cell]] = []
    for group, one in found:
        parts = (one["tokens"], one["confidence_in_bin"], one["accuracy_in_bin"])
        rows += [[group["label"], *bin_] for bin_ in zip(*parts, strict=True)]

    def plot(axes: Axes) -> str:
        for group, one in found:
            kept = [i for i, tokens in enumerate(one["tokens"]) if tokens >= _ENOUGH]
            x, y = ([one[n][i] for i in kept] for n in ("confidence_in_bin", "accuracy_in_bin"))
            label = f"{named(group)}: off by {100 * one['expected_error']:.1f} %"
            axes.plot(x, y, "o-", markersize=3.5, color=color_of(group), label=label)
        axes.plot([0, 1], [0, 1], color=MUTED, linestyle=DASHES[2], label="calibrated")
        axes.set(xlabel="probability of the most probable token", ylabel="how often it is right")
        axes.set(xlim=(0, 1), ylim=(0, 1))
        legend(axes, "upper left")
        return "Share of right predictions by their probability; on the diagonal they are equal."

    columns = ("setting", "tokens", "mean_confidence", "accuracy")
    return Figure("confidence", draw("confidence", plot), columns, rows)


def _filled(histogram: Data, enough: int) -> tuple[list[float], list[float]]:
    """Mean entropy and mean cross entropy of the bins that hold enough tokens for a mean."""
    kept = [i for i, tokens in enumerate(histogram["tokens"]) if tokens >= enough]
    return [histogram["mean_entropy"][i] for i in kept], [histogram["mean_ce"][i] for i in kept]
