"""The report's figures.

Of scores: differences to cross entropy by frequency, difficulty, domain and task. Of training:
losses, and how entropies and weights are distributed, step by step. Of weights and entropy: what a
token weighs, and whether entropy means doubt.
"""

from collections.abc import Sequence

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
    finished,
    histogram_behind,
    legend,
    named,
    panel,
    short,
    step_axis,
    thin,
)

_FAR = 10  # times what is usual, of differences
_DIVERGED = 2  # the same, of how far a training curve is above its lowest point
OFF = " (off the scale)"

Shown = list[tuple[Data, list[Data]]]  # settings and rows of their comparison


_NATS = "nats per token"
# Of every figure: whose comparisons, which rows, their unit, and what lies along the lower axis;
# where nothing does, what is compared stands line by line.
_DIFFERENCES = {
    "differences": ("comparisons", ("total", "bucket", "domain"), _NATS, ""),
    "differences-by-task": (
        "task_comparisons",
        ("tasks", "task"),
        "bits per byte of the right answers",
        "",
    ),
    "differences-by-decile": (
        "comparisons",
        ("total", "decile"),
        _NATS,
        "decile of the training occurrences, 1 is the most frequent",
    ),
    "differences-by-difficulty": (
        "comparisons",
        ("total", "difficulty"),
        _NATS,
        "third of the tokens by predicted entropy",
    ),
}


def differences(data: Data, name: str) -> Figure | None:
    """Draw differences to cross entropy with intervals, as `_DIFFERENCES` says of the figure."""
    comparisons, kinds, unit, along = _DIFFERENCES[name]
    shown = _shown(data, data[comparisons], kinds)
    if not shown:
        return None
    lines = 1.2 + (0.26 + 0.12 * len(shown)) * len(_places(shown))
    axes = panel(3.5 if along else lines)
    _draw_differences(axes, shown, f"{unit} (below 0: better)", upright=bool(along))
    if along:
        axes.set_xlabel(along)
    else:
        axes.tick_params(axis="y", length=0)
        axes.xaxis.set_major_locator(MaxNLocator(6))
    words = "Differences to cross entropy with 95 percent intervals; tables have the numbers."
    rows = [{"setting": group["label"], **row} for group, of_one in shown for row in of_one]
    return finished(name, axes, words, rows)


def _shown(data: Data, comparisons: list[Data], kinds: Sequence[str]) -> Shown:
    """Return the settings that have rows of these kinds, with these rows."""
    groups = {group["label"]: group for group in data["groups"]}
    every = [
        (groups[c["group"]], [row for row in c["rows"] if row["kind"] in kinds])
        for c in comparisons
    ]
    return [(group, rows) for group, rows in every if rows]


def _places(shown: Shown) -> list[tuple[str, str]]:
    """Return what is compared, in order: kinds and names of rows."""
    return list(dict.fromkeys((row["kind"], row["name"]) for _, rows in shown for row in rows))


def _draw_differences(axes: Axes, shown: Shown, unit: str, *, upright: bool) -> None:
    """Draw what is compared side by side: along the lower axis (`upright`), or line by line.

    Upright, lines join the parts behind the first, all tokens.
    """
    places, (ends, names) = _places(shown), _scale(shown)
    along, across = (axes.xaxis, axes.yaxis) if upright else (axes.yaxis, axes.xaxis)
    (axes.axhline if upright else axes.axvline)(0, color=MUTED, linewidth=1)
    step = (0.5 if upright else 0.7) / len(shown)
    for number, (group, rows) in enumerate(shown):
        color, shift = color_of(group), step * (number - (len(shown) - 1) / 2)
        at = [places.index((row["kind"], row["name"])) + shift for row in rows]
        if upright:
            axes.plot(at[1:], [row["difference"] for row in rows[1:]], color=color)
        for place, row in zip(at, rows, strict=True):
            _draw_difference(axes, row, place, color, ends, upright=upright)
        axes.plot([], [], "o-", color=color, markersize=4, label=names[number])
    words = [f"{name}-frequency" if kind == "bucket" else name for kind, name in places]
    if upright:
        words = [text.replace(" ", "\n") for text in words]
        axes.set(ylim=ends)
    else:
        words = [short(text, 24) for text in words]
        axes.set(xlim=ends, ylim=(len(places) - 0.5, -0.5))
    along.set_ticks(range(len(places)), words)
    along.grid(visible=False)
    across.grid(visible=True)
    across.set_label_text(unit.replace(" (", "\n(") if upright else unit)
    legend(axes)


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
    return [row[name] for name in ("difference", "low", "high") if row[name] is not None]


def _are_far(reaches: Sequence[float], times: float) -> list[bool]:
    """Say which settings reach so many times as far as is usual that they would hide the others."""
    usual = sorted(reaches)[(len(reaches) - 1) // 2]
    return [0 < times * usual < reach for reach in reaches]


_ENOUGH = 30  # tokens in a bin, for a mean
_ENTROPY = "entropy of the prediction (nats)"


def weights_over_entropy(data: Data) -> Figure | None:
    """Draw a token's weight by its entropy, over the histogram of the entropies that occur."""
    weights = data["weights"]
    if weights is None:
        return None
    axes = panel()
    histogram_behind(axes, weights["histogram"])
    for curve in weights["curves"]:
        group = data["groups"][curve["group"]]
        axes.plot(weights["entropy"], curve["weight"], color=color_of(group), label=named(group))
    axes.axhline(1, color=SERIES[0], linewidth=1.4, label="cross entropy")
    axes.set(xlabel=_ENTROPY, ylabel="weight (mean 1)", xlim=(0, weights["entropy"][-1]))
    axes.set_ylim(bottom=0)
    legend(axes)
    words = "Weight against entropy by setting, over the histogram of predicted entropies."
    rows = [
        {"setting": data["groups"][c["group"]]["label"], "entropy_nats": x, "weight_mean_1": y}
        for c in weights["curves"]
        for x, y in zip(weights["entropy"], c["weight"], strict=True)
    ]
    return finished("weights", axes, words, rows)


def entropy_calibration(data: Data) -> Figure | None:
    """Draw mean cross entropy in every bin of predicted entropy, first run of a group."""
    first = [(group, group["evaluated"][0]) for group in data["groups"] if group["evaluated"]]
    histograms = [(g, data["runs"][run]["evaluation"]["entropy_histogram"]) for g, run in first]
    if not histograms:
        return None
    axes = panel()
    histogram_behind(axes, histograms[0][1])
    top, rows = 0.0, []
    for group, one in histograms:
        enough = max(_ENOUGH, sum(one["tokens"]) // 2000)
        kept = [i for i, tokens in enumerate(one["tokens"]) if tokens >= enough]
        x, y = ([one[name][i] for i in kept] for name in ("mean_entropy", "mean_ce"))
        axes.plot(x, y, color=color_of(group), label=named(group))
        top = max([top, *x, *y])
        rows += [
            {"setting": group["label"], "mean_entropy": entropy, "mean_cross_entropy": ce}
            for entropy, ce in zip(x, y, strict=True)
        ]
    axes.plot([0, top], [0, top], color=MUTED, linestyle=DASHES[2], label="entropy itself")
    axes.set(xlabel=_ENTROPY, ylabel="mean cross entropy (nats)")
    axes.set_xlim(0, histograms[0][1]["edges"][-1])
    axes.set_ylim(bottom=0)
    legend(axes)
    words = "Mean cross entropy against predicted entropy; on the diagonal they are equal."
    return finished("calibration", axes, words, rows)


_FEWEST_TO_CUT = 40  # points of a curve, for its start to be cut off


def training_curves(data: Data, series: str) -> Figure | None:
    """Draw a number of every run's training log; as points, that of validation where it has one.

    Thin lines are runs, and a bold one is the mean of a group.
    """
    runs = [run for run in data["runs"] if series in run["training"]]
    if not runs:
        return None
    top = _top_after_start([run["training"][series] for run in runs])
    axes = panel()
    for run in runs:
        color = color_of(data["groups"][run["group"]])
        axes.plot(*thin(run["training"][series]), color=color, linewidth=0.7, alpha=0.5)
        if points := run["validation"].get(series):
            axes.plot(*points.values(), "o", color=color, markersize=4, markeredgecolor=PAGE)
    for group in data["groups"]:
        every = [data["runs"][index]["training"].get(series) for index in group["runs"]]
        if logged := [curve for curve in every if curve]:
            _draw_mean(axes, group, logged, top)
    axes.set(ylabel="nats per token", ylim=(None, top))
    step_axis(axes)
    legend(axes)
    words = f"Training curves of {series} for {len(runs)} runs, in nats per token over steps."
    rows = [
        _step(data, run, {"part": part}, step, nats_per_token=value)
        for run in runs
        for part in ("training", "validation")
        if series in run[part]
        for step, value in zip(*run[part][series].values(), strict=True)
    ]
    return finished(f"train-{series.replace(' ', '-')}", axes, words, rows)


def _step(data: Data, run: Data, what: Data, step: float, **value: float) -> Data:
    """Return the row of a number at a step of a run."""
    setting = data["groups"][run["group"]]["label"]
    return {"run": run["name"], "setting": setting, **what, "step": step, **value}


def _draw_mean(axes: Axes, group: Data, every: list[Data], top: float | None) -> None:
    """Draw the mean over a group's curves, at the steps that all of them logged."""
    curves = [dict(zip(*one.values(), strict=True)) for one in every]
    steps = sorted(set.intersection(*map(set, curves)))
    values = [float(np.mean([curve[step] for curve in curves])) for step in steps]
    is_beyond = top is not None and bool(values) and values[-1] > top
    mean = thin({"iterations": steps, "values": values})
    label = named(group) + OFF * is_beyond
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


_PERCENTILES = {"entropy": ("p50", "p10", "p90"), "weight": ("p50", "p99", "max")}


def distribution_over_training(data: Data, kind: str) -> Figure | None:
    """Draw percentiles of the entropies or relative weights of the first run of every setting.

    Solid is the median.
    """
    groups = [g for g in data["groups"] if kind == "entropy" or not g["is_baseline"]]
    first = [(group, data["runs"][group["runs"][0]]) for group in groups]
    shown = [(group, run) for group, run in first if f"{kind} p50" in run["observed"]]
    if not shown:
        return None
    unit = "nats" if kind == "entropy" else "relative_to_mean"
    axes, rows = panel(), []
    for group, run in shown:
        dashes = DASHES if kind == "weight" else (DASHES[0], DASHES[1], DASHES[1])
        for name, dash in zip(_PERCENTILES[kind], dashes, strict=False):
            label = named(group) if name == "p50" else "_nolegend_"
            curve = _relative(run, f"{kind} {name}", kind)
            width = 1.6 if name == "p50" else 1.0
            axes.plot(*thin(curve), color=color_of(group), linestyle=dash, label=label,
                      linewidth=width)  # fmt: skip
            rows += [
                _step(data, run, {"percentile": name}, step, **{unit: value})
                for step, value in zip(*curve.values(), strict=True)
            ]
    axes.set_ylabel("entropy (nats)" if kind == "entropy" else "weight / mean weight")
    if kind == "weight":
        axes.set_ylim(bottom=0)
    step_axis(axes)
    legend(axes)
    words = f"Median and other percentiles of the {kind} of tokens over training."
    return finished(f"train-{kind}-distribution", axes, words, rows)


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
