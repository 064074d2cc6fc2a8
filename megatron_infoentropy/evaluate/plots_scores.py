"""Figures of scores: perplexity by frequency and difficulty, and differences to cross entropy."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import (
    FixedLocator,
    FuncFormatter,
    LogLocator,
    MaxNLocator,
    NullLocator,
)
from numpy.typing import NDArray

from megatron_infoentropy.evaluate.buckets import BUCKETS
from megatron_infoentropy.evaluate.figure import (
    FILL,
    INK,
    MUTED,
    Cell,
    Data,
    Figure,
    color_of,
    draw,
    evaluated_groups,
    legend,
    named,
    short,
)
from megatron_infoentropy.evaluate.wording import MINUS, perplexity

_ALL = "all tokens"
_MAIN_KINDS = ("total", "bucket", "domain")
_FAR = 5  # times what is usual
_FEW_GROUPS = 2  # that leave room for numbers over the bars


def bucket_bars(data: Data) -> Figure | None:
    """Draw perplexity by frequency bucket: a bar a group with its interval, a point a seed."""
    places = [_ALL, *BUCKETS]
    groups = evaluated_groups(data)
    if not groups:
        return None

    def plot(axes: Axes) -> str:
        width = 0.8 / len(groups)
        for position, group in enumerate(groups):
            x = np.arange(len(places)) + (position - (len(groups) - 1) / 2) * width
            _bars(axes, data, group, places, x, width, numbers=len(groups) <= _FEW_GROUPS)
        _perplexity_axis(axes)
        axes.set_ylim(1, axes.get_ylim()[1] * 1.6)
        axes.set_xticks(range(len(places)), [place.replace(" ", "\n") for place in places])
        axes.tick_params(axis="x", length=0)
        legend(axes)
        return "Perplexity by token-frequency bucket and objective; the table has the numbers."

    rows: list[list[Cell]] = []
    for group in groups:
        for index in group["evaluated"]:
            run = data["runs"][index]
            rows += [
                [group["label"], run["name"], place, score["tokens"], score["nats_per_token"],
                 score["perplexity"]]
                for place, score in _scores(run["evaluation"]).items()
            ]  # fmt: skip
        for place, (low, high) in group["intervals"].items():
            rows += [[group["label"], f"{end} end of 95 %, documents", place, None, nats,
                      float(np.exp(nats))]
                     for end, nats in (("lower", low), ("upper", high))]  # fmt: skip
    columns = ("setting", "run", "bucket", "tokens", "nats_per_token", "perplexity")
    return draw("buckets", plot, columns, rows)


def _bars(
    axes: Axes,
    data: Data,
    group: Data,
    places: Sequence[str],
    x: NDArray[np.floating[Any]],
    width: float,
    *,
    numbers: bool,
) -> None:
    color = color_of(group)
    nats = _nats(data, group, places)
    means = np.exp(nats.mean(axis=0))
    # A log axis has no zero; bars start at 1, the perplexity of a perfect prediction, so their
    # length is the nats per token.
    axes.bar(x, means - 1, width * 0.92, bottom=1, color=color, label=named(group))
    known = [i for i, place in enumerate(places) if place in group["intervals"]]
    ends = np.exp([group["intervals"][places[i]] for i in known])
    if known:
        axes.vlines(x[known], ends[:, 0], ends[:, 1], color=INK, linewidth=1.1)
    if len(nats) > 1:
        every = np.broadcast_to(x, nats.shape)
        axes.plot(every, np.exp(nats), "o", color=INK, markersize=2.6)
    for place, mean in zip(x, means, strict=True) if numbers else ():
        axes.annotate(perplexity(mean), (place, mean), (0, 8), ha="center",
                      textcoords="offset points", fontsize=9)  # fmt: skip


def differences_by(data: Data, kind: str) -> Figure | None:
    """Draw differences to cross entropy by frequency decile or difficulty, with intervals.

    Beside the parts are all tokens.
    """
    shown = [(c, [row for row in c["rows"] if row["kind"] == kind]) for c in data["comparisons"]]
    shown = [(c, [c["rows"][0], *rows]) for c, rows in shown if rows]
    if not shown:
        return None
    places = list(dict.fromkeys(row["name"] for _, rows in shown for row in rows))
    by_label = {group["label"]: group for group in data["groups"]}

    def plot(axes: Axes) -> str:
        axes.axhline(0, color=MUTED, linewidth=1)
        for number, (comparison, rows) in enumerate(shown):
            color = color_of(by_label[comparison["group"]])
            shift = 0.5 * (number - (len(shown) - 1) / 2) / len(shown)
            x = [places.index(row["name"]) + shift for row in rows]
            label = named(by_label[comparison["group"]])
            values = [row["difference"] for row in rows]
            axes.plot(x[1:], values[1:], "o-", color=color, markersize=4, label=label)
            axes.plot(x[0], values[0], "o", color=color, markersize=4)
            for at, row in zip(x, rows, strict=True):
                if row["low"] is not None:
                    axes.vlines(at, row["low"], row["high"], color=color, linewidth=1.4)
        axes.set_xticks(range(len(places)), [place.replace(" ", "\n") for place in places])
        axes.set_ylabel("nats per token\n(below 0: better)")
        _compress_outliers(axes, [rows for _, rows in shown])
        axes.set_xlabel(
            "decile of the training occurrences, 1 is the most frequent"
            if kind == "decile"
            else "third of the tokens by predicted entropy"
        )
        legend(axes)
        return f"Difference to cross entropy by {kind}, with 95 percent intervals."  # fmt: skip

    return draw(f"differences-by-{kind}", plot, *_row_cells(shown))


def _compress_outliers(axes: Axes, settings: list[list[Data]]) -> None:
    """Let the axis be logarithmic beyond what most settings need, if one needs far more."""
    reaches = [max(abs(row["difference"]) for row in rows) for rows in settings]
    usual = float(f"{np.median(reaches):.1g}")
    if not 0 < _FAR * usual < max(reaches):
        return
    axes.set_yscale("symlog", linthresh=2 * usual)
    decades = [d * 10.0**k for k in range(-4, 4) for d in (1, 3)]
    ticks = [0.0, usual, *(tick for tick in decades if tick > 2 * usual)]
    axes.yaxis.set_major_locator(
        FixedLocator(sorted({sign * t for t in ticks for sign in (1, -1)}))
    )
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}".replace("-", MINUS)))
    axes.set_ylabel(f"{axes.get_ylabel()[:-1]},\nlogarithmic beyond {2 * usual:g})")


def _row_cells(
    shown: list[tuple[Data, list[Data]]],
) -> tuple[tuple[str, ...], list[list[Cell]]]:
    """Return the columns and cells of comparison rows."""
    columns = tuple(shown[0][1][0])
    cells = [[c["group"], *(row[name] for name in columns)] for c, rows in shown for row in rows]
    return ("setting", *columns), cells


def differences(data: Data) -> Figure | None:
    """Draw differences to cross entropy and the seed noise: all tokens, by bucket, by domain."""
    return _differences(data, "differences", data["comparisons"], _MAIN_KINDS, "nats per token")


def task_differences(data: Data) -> Figure | None:
    """Draw differences in bits per byte of the right answers: by task, and their mean."""
    unit = "bits per byte of the right answers"
    comparisons = data["task_comparisons"]
    return _differences(data, "differences-by-task", comparisons, ("tasks", "task"), unit)


def _differences(
    data: Data, name: str, comparisons: list[Data], kinds: Sequence[str], unit: str
) -> Figure | None:
    comparisons = [comparison for comparison in comparisons if comparison["rows"]]
    if not comparisons:
        return None
    shown = [(c, [r for r in c["rows"] if r["kind"] in kinds]) for c in comparisons]
    names = list(dict.fromkeys((row["kind"], row["name"]) for _, rows in shown for row in rows))
    by_label = {group["label"]: group for group in data["groups"]}

    def plot(axes: Axes) -> str:
        step = 0.7 / len(comparisons)
        for number, (comparison, rows) in enumerate(shown):
            color = color_of(by_label[comparison["group"]])
            for row in rows:
                y = names.index((row["kind"], row["name"]))
                y_own = y + (number - (len(comparisons) - 1) / 2) * step
                _difference(axes, row, y_own, step, color)
            axes.plot([], [], "o-", color=color, label=named(by_label[comparison["group"]]))
        axes.axvline(0, color=MUTED, linewidth=1)
        axes.set_yticks(range(len(names)), [short(_place(*name), 24) for name in names])
        axes.set_ylim(len(names) - 0.5, -0.5)
        axes.grid(visible=False, axis="y")
        axes.grid(visible=True, axis="x")
        axes.tick_params(axis="y", length=0)
        axes.set_xlabel(f"{unit} (below 0: better)")
        axes.xaxis.set_major_locator(MaxNLocator(6))
        if len(comparisons) > 1:
            legend(axes)
        return "Differences to cross entropy with intervals; the tables below have the numbers."

    height = 1.2 + (0.26 + 0.12 * len(comparisons)) * len(names)
    return draw(name, plot, *_row_cells(shown), height=height)


def _difference(axes: Axes, row: Data, y: float, step: float, color: str) -> None:
    if row["seed_noise"] is not None:
        noise = row["seed_noise"]
        axes.barh(y, 2 * noise, step * 0.9, left=-noise, color=FILL, zorder=0.5)
    if row["low"] is not None:
        axes.plot([row["low"], row["high"]], [y, y], color=color, linewidth=2.2)
    axes.plot(row["difference"], y, "o", color=color, markersize=5)


def _perplexity_axis(axes: Axes) -> None:
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 3.0)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.set_ylabel("perplexity (log scale)")


def _scores(evaluation: Data) -> Data:
    return {_ALL: evaluation["total"], **evaluation["buckets"]}


def _nats(data: Data, group: Data, places: Sequence[str]) -> NDArray[np.float64]:
    """Return nats per token of a group's evaluated runs, [runs, places]; NaN without tokens."""
    rows = []
    for index in group["evaluated"]:
        scores = _scores(data["runs"][index]["evaluation"])
        values = [scores[place]["nats_per_token"] for place in places]
        rows.append([np.nan if value is None else value for value in values])
    return np.array(rows)


def _place(kind: str, name: str) -> str:
    return f"{name}-frequency" if kind == "bucket" else name
