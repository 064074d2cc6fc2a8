"""The report's figures.

Of scores: differences to cross entropy by frequency, difficulty, domain and task. Of training:
losses, and how entropies and weights are distributed, step by step. Of weights and entropy:
what a token weighs, and whether entropy means doubt.
"""

from collections.abc import Callable, Sequence
from itertools import cycle

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from megatron_infoentropy.evaluate.figure import (
    DASHES,
    MUTED,
    PAGE,
    SERIES,
    Data,
    Figure,
    color_of,
    draw,
    histogram_behind,
    legend,
    legend_label,
    named,
    short,
    step_axis,
    thin,
)

_MAIN_KINDS = ("total", "bucket", "domain")
_FAR = 10  # times what is usual, of differences
_DIVERGED = 2  # the same, of how far a training curve is above its lowest point
OFF = " (off the scale)"

Shown = list[tuple[Data, list[Data]]]  # settings and rows of their comparison


def differences_by(data: Data, kind: str) -> Figure | None:
    """Draw differences to cross entropy by frequency decile or difficulty, with intervals.

    Beside the parts are all tokens.
    """
    every = _shown(data, data["comparisons"], ("total", kind))
    shown = [(group, rows) for group, rows in every if len(rows) > 1]
    if not shown:
        return None
    places = list(dict.fromkeys(row["name"] for _, rows in shown for row in rows))
    ends, names = _scale(shown)

    def plot(axes: Axes) -> str:
        axes.axhline(0, color=MUTED, linewidth=1)
        for number, (group, rows) in enumerate(shown):
            color = color_of(group)
            shift = 0.5 * (number - (len(shown) - 1) / 2) / len(shown)
            x = [places.index(row["name"]) + shift for row in rows]
            axes.plot(x[1:], [row["difference"] for row in rows[1:]], color=color)
            for at, row in zip(x, rows, strict=True):
                _draw_difference(axes, row, at, color, ends, upright=True)
            axes.plot([], [], "o-", color=color, markersize=4, label=names[number])
        axes.set_xticks(range(len(places)), [place.replace(" ", "\n") for place in places])
        axes.set(ylabel="nats per token\n(below 0: better)", ylim=ends)
        axes.set_xlabel(
            "decile of the training occurrences, 1 is the most frequent"
            if kind == "decile"
            else "third of the tokens by predicted entropy"
        )
        legend(axes)
        return f"Difference to cross entropy by {kind}, with 95 percent intervals."

    return draw(f"differences-by-{kind}", plot)


def _scale(shown: Shown) -> tuple[tuple[float, float], list[str]]:
    """Return the ends of the axis of differences, and the settings' names in the legend.

    Where one setting needs far more than is usual, the axis is what the others need.
    """
    reaches = [max(abs(end) for row in rows for end in _ends(row)) for _, rows in shown]
    are_far = _are_far(reaches, _FAR)
    near = [rows for (_, rows), is_far in zip(shown, are_far, strict=True) if not is_far]
    ends = [0.0, *(end for rows in near for row in rows for end in _ends(row))]
    margin = 0.06 * (max(ends) - min(ends)) or 0.01  # where nothing differs
    names = [named(group) + OFF * is_far for (group, _), is_far in zip(shown, are_far, strict=True)]
    return (min(ends) - margin, max(ends) + margin), names


def _ends(row: Data) -> list[float]:
    ends: list[float] = [
        row[name] for name in ("difference", "low", "high") if row[name] is not None
    ]
    return ends


def _are_far(reaches: Sequence[float], times: float) -> list[bool]:
    """Say which settings reach so many times as far as is usual that they would hide the others."""
    usual = sorted(reaches)[(len(reaches) - 1) // 2]
    return [0 < times * usual < reach for reach in reaches]


def _draw_difference(
    axes: Axes, row: Data, place: float, color: str, ends: tuple[float, float], *, upright: bool
) -> None:
    """Draw a difference and its interval; of one beyond an end of the axis, an arrow there."""
    if row["low"] is not None:
        draw_lines = axes.vlines if upright else axes.hlines
        draw_lines(place, row["low"], row["high"], color=color, linewidth=1.8)
    value, (low, high) = row["difference"], ends
    shown = min(max(value, low), high)
    marker = "o" if shown == value else ("v^" if upright else "<>")[value > high]
    point = (place, shown) if upright else (shown, place)
    axes.plot(*point, marker, color=color, markersize=4.5, clip_on=False)


def _shown(data: Data, comparisons: list[Data], kinds: Sequence[str]) -> Shown:
    """Return the settings that have rows of these kinds, with these rows."""
    groups = {group["label"]: group for group in data["groups"]}
    every = [
        (groups[c["group"]], [row for row in c["rows"] if row["kind"] in kinds])
        for c in comparisons
    ]
    return [(group, rows) for group, rows in every if rows]


def differences(data: Data) -> Figure | None:
    """Draw differences to cross entropy: all tokens, by bucket, by domain."""
    return _differences(data, "differences", data["comparisons"], _MAIN_KINDS, "nats per token")


def task_differences(data: Data) -> Figure | None:
    """Draw differences in bits per byte of the right answers: by task, and their mean."""
    unit = "bits per byte of the right answers"
    comparisons = data["task_comparisons"]
    return _differences(data, "differences-by-task", comparisons, ("tasks", "task"), unit)


def _differences(
    data: Data, name: str, comparisons: list[Data], kinds: Sequence[str], unit: str
) -> Figure | None:
    shown = _shown(data, comparisons, kinds)
    if not shown:
        return None
    places = list(dict.fromkeys((row["kind"], row["name"]) for _, rows in shown for row in rows))
    ends, names = _scale(shown)

    def plot(axes: Axes) -> str:
        step, middle = 0.7 / len(shown), (len(shown) - 1) / 2
        for number, (group, rows) in enumerate(shown):
            color = color_of(group)
            for row in rows:
                y = places.index((row["kind"], row["name"])) + step * (number - middle)
                _draw_difference(axes, row, y, color, ends, upright=False)
            axes.plot([], [], "o-", color=color, label=names[number])
        axes.axvline(0, color=MUTED, linewidth=1)
        axes.set_yticks(range(len(places)), [short(_place(*place), 24) for place in places])
        axes.set(xlim=ends, ylim=(len(places) - 0.5, -0.5))
        axes.grid(visible=False, axis="y")
        axes.grid(visible=True, axis="x")
        axes.tick_params(axis="y", length=0)
        axes.set_xlabel(f"{unit} (below 0: better)")
        axes.xaxis.set_major_locator(MaxNLocator(6))
        if len(shown) > 1:
            legend(axes)
        return "Differences to cross entropy with intervals; the tables below have the numbers."

    height = 1.2 + (0.26 + 0.12 * len(shown)) * len(places)
    return draw(name, plot, height=height)


def _place(kind: str, name: str) -> str:
    return f"{name}-frequency" if kind == "bucket" else name


_ENOUGH = 30  # tokens in a bin, for a mean


def weights_over_entropy(data: Data) -> Figure | None:
    """Draw a token's weight by its entropy, over the histogram of the entropies that occur."""
    weights = data["weights"]
    if weights is None:
        return None

    def plot(axes: Axes) -> str:
        histogram_behind(axes, weights["histogram"])
        for curve in weights["curves"]:
            group = data["groups"][curve["group"]]
            axes.plot(weights["entropy"], curve["weight"], color=color_of(group), linewidth=2.4,
                      label=named(group))  # fmt: skip
        axes.axhline(1, color=SERIES[0], linewidth=1.4, label="cross entropy")
        axes.set(xlabel="entropy of the prediction (nats)", ylabel="weight (mean 1)")
        axes.set_xlim(0, weights["entropy"][-1])
        axes.set_ylim(bottom=0)
        legend(axes, "upper left")
        return "Weight against entropy by setting, over the histogram of predicted entropies."

    return draw("weights", plot)


def entropy_calibration(data: Data) -> Figure | None:
    """Draw mean cross entropy in every bin of predicted entropy, first run of a group."""
    first = [(group, group["evaluated"][0]) for group in data["groups"] if group["evaluated"]]
    histograms = [(g, data["runs"][run]["evaluation"]["entropy_histogram"]) for g, run in first]
    if not histograms:
        return None
    points = [(g, *_filled(h, max(_ENOUGH, sum(h["tokens"]) // 2000))) for g, h in histograms]

    def plot(axes: Axes) -> str:
        histogram_behind(axes, histograms[0][1])
        for group, x, y in points:
            axes.plot(x, y, color=color_of(group), label=named(group))
        top = max([0.0, *(value for _, x, y in points for value in (*x, *y))])
        axes.plot([0, top], [0, top], color=MUTED, linestyle=DASHES[2], label="entropy itself")
        axes.set(xlabel="entropy of the prediction (nats)", ylabel="mean cross entropy (nats)")
        axes.set_xlim(0, histograms[0][1]["edges"][-1])
        axes.set_ylim(bottom=0)
        legend(axes, "upper left")
        return "Mean cross entropy against predicted entropy; on the diagonal they are equal."

    return draw("calibration", plot)


def _filled(histogram: Data, enough: int) -> tuple[list[float], list[float]]:
    """Return mean entropy and cross entropy of the bins with enough tokens for a mean."""
    kept = [i for i, tokens in enumerate(histogram["tokens"]) if tokens >= enough]
    return [histogram["mean_entropy"][i] for i in kept], [histogram["mean_ce"][i] for i in kept]


_CE = "cross entropy"
_MOST_NAMED = 6  # runs, beyond which only groups are named
_FEWEST_TO_CUT = 40  # points of a curve, for its start to be cut off


def training_curves(data: Data) -> Figure | None:
    """Draw every run's cross entropy on training batches, and on validation sets as points.

    Of many runs the thin lines are runs, and a bold one is the mean of a group.
    """
    runs = [run for run in data["runs"] if _CE in run["training"]]
    if not runs:
        return None
    many = len(runs) > _MOST_NAMED
    top = _top_after_start([run["training"][_CE] for run in runs])

    def plot(axes: Axes) -> str:
        dashes = {group: cycle(DASHES) for group in range(len(data["groups"]))}
        for run in runs:
            color = color_of(data["groups"][run["group"]])
            name = short(run["name"], 30) + _beyond(top, run["training"][_CE]["values"])
            label = "_nolegend_" if many else legend_label(name)
            dash = "solid" if many else next(dashes[run["group"]])
            width, alpha = (0.7, 0.5) if many else (1.6, 1.0)
            axes.plot(*thin(run["training"][_CE]), color=color, linestyle=dash, label=label,
                      linewidth=width, alpha=alpha)  # fmt: skip
            points = run["validation"].get(_CE)
            if points:
                size = 3.5 if many else 6
                axes.plot(*points.values(), "o", color=color, markersize=size, markeredgecolor=PAGE)
        if many:
            _means(axes, data, top)
        axes.set(ylabel="nats per token", ylim=(None, top))
        step_axis(axes)
        legend(axes, "upper right")
        return f"Training curves of {_CE} for {len(runs)} runs, in nats per token over steps."

    return draw("train-cross-entropy", plot)


def entropies_over_training(data: Data) -> Figure | None:
    """Draw the middle 80 % of the predicted entropies and their median, first run of a group."""

    def plot(axes: Axes, color: str, label: str, curves: list[Data]) -> None:
        low, middle, high = map(thin, curves)
        axes.fill_between(low[0], low[1], high[1], color=color, alpha=0.09, linewidth=0)
        axes.plot(*middle, color=color, label=label)
        axes.set_ylabel("entropy (nats)")

    words = "Median entropy of predictions over training, with the middle 80 percent."
    return _distribution(
        data, "entropy", ("entropy p10", "entropy p50", "entropy p90"), plot, words
    )


def weights_over_training(data: Data) -> Figure | None:
    """Draw median, 99th percentile and largest weight over the mean, first run of a group."""

    def plot(axes: Axes, color: str, label: str, curves: list[Data]) -> None:
        for curve, dash in zip(curves, DASHES, strict=False):
            name = label if dash == "solid" else "_nolegend_"
            axes.plot(*thin(curve), color=color, linestyle=dash, label=name)
        axes.set_ylabel("weight / mean weight")

    words = "Median, 99th percentile and largest weight over training, relative to the mean."
    return _distribution(data, "weight", ("weight p50", "weight p99", "weight max"), plot, words)


def _distribution(
    data: Data,
    kind: str,
    names: tuple[str, ...],
    plot: Callable[[Axes, str, str, list[Data]], None],
    words: str,
) -> Figure | None:
    """Draw the percentiles `names` of every group that logged them; `plot` draws those of one."""
    groups = [g for g in data["groups"] if kind == "entropy" or not g["is_baseline"]]
    first = [(group, data["runs"][group["runs"][0]]) for group in groups]
    shown = [(group, run) for group, run in first if names[0] in run["observed"]]
    if not shown:
        return None
    curves = [[_relative(run, name, kind) for name in names] for _, run in shown]

    def draw_all(axes: Axes) -> str:
        for (group, _), every in zip(shown, curves, strict=True):
            plot(axes, color_of(group), named(group), every)
        if kind == "weight":
            axes.set_ylim(bottom=0)
        step_axis(axes)
        legend(axes)
        return words

    return draw(f"train-{kind}-distribution", draw_all)


def _relative(run: Data, name: str, kind: str) -> Data:
    """Return an observed series; weights over the mean weight of the same steps."""
    series: Data = run["observed"][name]
    if kind == "entropy" or "weight" not in run["training"]:
        return series
    mean = dict(zip(*run["training"]["weight"].values(), strict=True))
    points = [
        (step, value / mean[step])
        for step, value in zip(series["iterations"], series["values"], strict=True)
        if mean.get(step)
    ]
    return {"iterations": [step for step, _ in points], "values": [value for _, value in points]}


def _beyond(top: float | None, values: list[float]) -> str:
    """Return what the legend adds to a curve that ends beyond the top of the axis."""
    return OFF if top is not None and values and values[-1] > top else ""


def _means(axes: Axes, data: Data, top: float | None) -> None:
    """Draw the mean over a group's runs, at the steps that all of them logged."""
    for group in data["groups"]:
        every = [data["runs"][index]["training"].get(_CE) for index in group["runs"]]
        curves = [dict(zip(*one.values(), strict=True)) for one in every if one]
        if not curves:
            continue
        steps = sorted(set.intersection(*(set(curve) for curve in curves)))
        values = [float(np.mean([curve[step] for curve in curves])) for step in steps]
        mean = thin({"iterations": steps, "values": values})
        label = named(group) + _beyond(top, values)
        axes.plot(*mean, color=color_of(group), linewidth=1.8, label=label)


def _top_after_start(curves: list[Data]) -> float | None:
    """Return an upper end of the axis that cuts the steep start and what has diverged."""
    if min(len(curve["values"]) for curve in curves) < _FEWEST_TO_CUT:
        return None
    late = [np.array(curve["values"])[len(curve["values"]) // 20 :] for curve in curves]
    low = float(min(part.min() for part in late))
    rises = [float(part.max()) - low for part in late]
    are_far = _are_far(rises, _DIVERGED)
    return low + 1.05 * max(r for r, is_far in zip(rises, are_far, strict=True) if not is_far)
