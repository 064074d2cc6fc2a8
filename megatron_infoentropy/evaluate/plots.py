"""The report's figures, drawn from the data of report.json and nothing else.

Every figure is one panel, so that a phone can show it in full width, and a function of the report's
data that returns an SVG element, or None where the data has nothing to draw.
"""

from itertools import cycle
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator
from numpy.typing import NDArray

from megatron_infoentropy.evaluate.buckets import BUCKETS
from megatron_infoentropy.evaluate.svg import FILL, INK, MUTED, PAGE, SERIES, draw
from megatron_infoentropy.evaluate.wording import perplexity

Data = dict[str, Any]

_DASHES: tuple[Any, ...] = ("solid", (0, (5, 1.6)), (0, (1.6, 1.4)), (0, (6, 1.6, 1.4, 1.6)))
_MOST_POINTS = 400
_MOST_LEGEND_ENTRIES = 8
_FEWEST_TO_CUT = 40  # points of a curve, for its start to be cut off


def training_curves(data: Data, series: str, *, validation: bool) -> str | None:
    """One number of the training log of every run; with `validation`, points of the same name."""
    runs = [run for run in data["runs"] if series in run["training"]]
    if not runs:
        return None

    def plot(axes: Axes) -> str:
        dashes: dict[int, Any] = {}
        for run in runs:
            color = _color(data["groups"][run["group"]])
            label = _short(run["name"], 30)
            if len(runs) > _MOST_LEGEND_ENTRIES:  # name the groups, each once
                known = run["group"] in dashes
                label = "_nolegend_" if known else data["groups"][run["group"]]["label"]
            dash = next(dashes.setdefault(run["group"], cycle(_DASHES)))
            steps, values = _thin(run["training"][series])
            axes.plot(steps, values, color=color, linestyle=dash, label=label)
            points = run["validation"].get(series) if validation else None
            if points:
                axes.plot(*points.values(), "o", color=color, markersize=6, markeredgecolor=PAGE)
        axes.set(xlabel="step", ylabel="nats per token")
        axes.set_ylim(top=_top_after_start([run["training"][series] for run in runs]))
        axes.xaxis.set_major_locator(MaxNLocator(8, integer=True, steps=[1, 2, 5, 10]))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        axes.legend(loc="upper right")
        return f"Training curves of {series} for {len(runs)} runs, in nats per token over steps."

    return draw(f"train-{series.replace(' ', '-')}", plot)


def bucket_bars(data: Data) -> str | None:
    """Perplexity by frequency bucket: a bar per group, a point per seed."""
    groups = [group for group in data["groups"] if group["evaluated"]]
    if not groups:
        return None
    places = ["all tokens", *BUCKETS]

    def plot(axes: Axes) -> str:
        width = 0.8 / len(groups)
        for position, group in enumerate(groups):
            color = _color(group)
            values = _perplexities(data, group, places)
            x = np.arange(len(places)) + (position - (len(groups) - 1) / 2) * width
            means = np.exp(np.log(values).mean(axis=0))
            # A log axis has no zero; bars start at 1, the perplexity of a perfect prediction, so
            # their length is the nats per token.
            axes.bar(x, means - 1, width * 0.92, bottom=1, color=color, label=group["label"])
            if len(values) > 1:
                every = np.broadcast_to(x, values.shape)
                axes.plot(every, values, "o", color=INK, markersize=3.2)
            if len(groups) <= 3:
                for place, mean in zip(x, means, strict=True):
                    axes.annotate(perplexity(mean), (place, mean), (0, 5), ha="center",
                                  textcoords="offset points", fontsize=9)  # fmt: skip
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 3.0)))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        axes.set_ylim(1, axes.get_ylim()[1] * 1.6)
        axes.set_xticks(range(len(places)), [place.replace(" ", "\n") for place in places])
        axes.tick_params(axis="x", length=0)
        axes.set_ylabel("perplexity (log scale)")
        axes.figure.legend(loc="outside upper left", ncols=2)
        return "Perplexity by token-frequency bucket and objective; the table has the numbers."

    return draw("buckets", plot)


def differences(data: Data) -> str | None:
    """Differences to cross entropy with their interval over documents, and the seed noise."""
    comparisons = [comparison for comparison in data["comparisons"] if comparison["rows"]]
    if not comparisons:
        return None
    rows = [row for comparison in comparisons for row in comparison["rows"]]
    names = list(dict.fromkeys((row["kind"], row["name"]) for row in rows))
    color_of = {group["label"]: _color(group) for group in data["groups"]}

    def plot(axes: Axes) -> str:
        step = 0.5 / len(comparisons)
        for number, comparison in enumerate(comparisons):
            color = color_of[comparison["group"]]
            for row in comparison["rows"]:
                y = names.index((row["kind"], row["name"]))
                y_own = y + (number - (len(comparisons) - 1) / 2) * step
                if row["seed_noise"] is not None:
                    noise = row["seed_noise"]
                    axes.barh(y_own, 2 * noise, step * 1.5, left=-noise, color=FILL, zorder=0.5)
                if row["low"] is not None:
                    axes.plot([row["low"], row["high"]], [y_own, y_own], color=color, linewidth=2.2)
                axes.plot(row["difference"], y_own, "o", color=color, markersize=6)
            axes.plot([], [], "o-", color=color, label=comparison["group"])
        axes.axvline(0, color=MUTED, linewidth=1)
        axes.set_yticks(range(len(names)), [_short(_place(*name), 24) for name in names])
        axes.set_ylim(len(names) - 0.5, -0.5)
        axes.grid(visible=False, axis="y")
        axes.grid(visible=True, axis="x")
        axes.tick_params(axis="y", length=0)
        axes.set_xlabel("nats per token (below 0: better)")
        axes.xaxis.set_major_locator(MaxNLocator(6))
        if len(comparisons) > 1:
            axes.figure.legend(loc="outside upper left", ncols=2)
        return "Differences to cross entropy with intervals; the tables below have the numbers."

    return draw("differences", plot, height=1.2 + 0.38 * len(names) + 0.1 * len(comparisons))


def weight_curves(data: Data) -> str | None:
    """Weight of a token by its entropy, over the histogram of the entropies that occur."""
    weights = data["weights"]
    if weights is None:
        return None

    def plot(axes: Axes) -> str:
        _histogram_behind(axes, weights["histogram"])
        others = cycle(_DASHES[1:])
        for curve in weights["curves"]:
            group = _group_with_weight(data, curve)
            color, dash = (_color(group), "solid") if group else (INK, next(others))
            width = 2.4 if group else 1.3
            label = curve["label"] + (" (used)" if group else "")
            axes.plot(weights["entropy"], curve["weight"], color=color, linestyle=dash,
                      linewidth=width, label=label)  # fmt: skip
        axes.axhline(1, color=SERIES[0], linewidth=1.4, label="cross entropy")
        axes.set(xlabel="entropy of the prediction (nats)", ylabel="weight (mean 1)")
        axes.set_xlim(0, weights["entropy"][-1])
        axes.set_ylim(bottom=0)
        axes.legend(loc="upper left")
        return (
            "Weight against entropy for several gamma, over the histogram of predicted entropies."
        )

    return draw("weights", plot)


def calibration(data: Data) -> str | None:
    """Mean cross entropy of the tokens in every bin of predicted entropy, first run of a group."""
    groups = [group for group in data["groups"] if group["evaluated"]]
    if not groups:
        return None
    first = [data["runs"][group["evaluated"][0]]["evaluation"] for group in groups]
    histograms = [evaluation["entropy_histogram"] for evaluation in first]

    def plot(axes: Axes) -> str:
        _histogram_behind(axes, histograms[0])
        top = 0.0
        for group, histogram in zip(groups, histograms, strict=True):
            x, y = _filled(histogram, max(30, sum(histogram["tokens"]) // 2000))
            axes.plot(x, y, color=_color(group), label=group["label"])
            top = max([top, *x, *y])
        axes.plot([0, top], [0, top], color=MUTED, linestyle=_DASHES[2], label="entropy itself")
        axes.set(xlabel="entropy of the prediction (nats)", ylabel="mean cross entropy (nats)")
        axes.set_xlim(0, histograms[0]["edges"][-1])
        axes.set_ylim(bottom=0)
        axes.legend(loc="upper left")
        return "Mean cross entropy against predicted entropy; on the diagonal they are equal."

    return draw("calibration", plot)


def _color(group: Data) -> str:
    return SERIES[group["color"] - 1]


def _group_with_weight(data: Data, curve: Data) -> Data | None:
    """The group that was trained with a curve's weights, if any was."""
    for group in data["groups"]:
        info = data["runs"][group["runs"][0]]["info"]
        same = (info["gamma"], info["sigma"]) == (curve["gamma"], curve["sigma"])
        if info["objective"] == "infoentropy" and same and not group["is_baseline"]:
            return dict(group)
    return None


def _histogram_behind(axes: Axes, histogram: Data) -> None:
    """Shares of tokens by entropy, as a pale area of half the panel's height without an axis."""
    behind = axes.twinx()
    tokens = np.array(histogram["tokens"], dtype=float)
    behind.stairs(tokens / tokens.max(), histogram["edges"], fill=True, color=FILL)
    behind.set_ylim(0, 2)
    behind.set_axis_off()
    axes.set_zorder(behind.get_zorder() + 1)
    axes.patch.set_visible(False)


def _perplexities(data: Data, group: Data, places: list[str]) -> NDArray[np.float64]:
    """Perplexity of every evaluated run of a group in every bucket, [runs, places]."""
    rows = []
    for index in group["evaluated"]:
        summary = data["runs"][index]["evaluation"]
        cells = {places[0]: summary["total"], **summary["buckets"]}
        rows.append([cells[place]["perplexity"] or np.nan for place in places])
    return np.array(rows)


def _filled(histogram: Data, enough: int) -> tuple[list[float], list[float]]:
    """Mean entropy and mean cross entropy of the bins that hold enough tokens for a mean."""
    kept = [i for i, tokens in enumerate(histogram["tokens"]) if tokens >= enough]
    return [histogram["mean_entropy"][i] for i in kept], [histogram["mean_ce"][i] for i in kept]


def _thin(series: Data) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """A curve of at most `_MOST_POINTS` points, each the mean of a block of logged ones."""
    steps, values = (np.array(series[name], dtype=float) for name in ("iterations", "values"))
    block = -(-len(steps) // _MOST_POINTS)
    starts = np.arange(0, len(steps), block)
    sizes = np.diff(np.append(starts, len(steps)))
    return np.add.reduceat(steps, starts) / sizes, np.add.reduceat(values, starts) / sizes


def _top_after_start(curves: list[Data]) -> float | None:
    """Upper end of the axis that cuts the steep start, so that the end can be told apart."""
    if min(len(curve["values"]) for curve in curves) < _FEWEST_TO_CUT:
        return None
    late = [np.array(curve["values"])[len(curve["values"]) // 20 :] for curve in curves]
    low, high = min(part.min() for part in late), max(part.max() for part in late)
    return float(high + 0.05 * (high - low))


def _place(kind: str, name: str) -> str:
    return f"{name}-frequency" if kind == "bucket" else name


def _short(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 3] + "..."
