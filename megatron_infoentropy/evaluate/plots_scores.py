"""Figures of scores: differences to cross entropy by frequency, difficulty, domain and task."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from megatron_infoentropy.evaluate.figure import (
    MUTED,
    Cell,
    Data,
    Figure,
    color_of,
    draw,
    legend,
    named,
    short,
)
from megatron_infoentropy.evaluate.wording import MINUS

_MAIN_KINDS = ("total", "bucket", "domain")
_FAR = 5  # times what is usual

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

    def plot(axes: Axes) -> str:
        axes.axhline(0, color=MUTED, linewidth=1)
        for number, (group, rows) in enumerate(shown):
            color = color_of(group)
            shift = 0.5 * (number - (len(shown) - 1) / 2) / len(shown)
            x = [places.index(row["name"]) + shift for row in rows]
            values = [row["difference"] for row in rows]
            axes.plot(x[1:], values[1:], "o-", color=color, markersize=4, label=named(group))
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
        return f"Difference to cross entropy by {kind}, with 95 percent intervals."

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


def _shown(data: Data, comparisons: list[Data], kinds: Sequence[str]) -> Shown:
    """Return the settings that have rows of these kinds, with these rows."""
    groups = {group["label"]: group for group in data["groups"]}
    every = [
        (groups[c["group"]], [row for row in c["rows"] if row["kind"] in kinds])
        for c in comparisons
    ]
    return [(group, rows) for group, rows in every if rows]


def _row_cells(shown: Shown) -> tuple[tuple[str, ...], list[list[Cell]]]:
    """Return the columns and cells of comparison rows."""
    columns = tuple(shown[0][1][0])
    cells = [[g["label"], *(row[name] for name in columns)] for g, rows in shown for row in rows]
    return ("setting", *columns), cells


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
    names = list(dict.fromkeys((row["kind"], row["name"]) for _, rows in shown for row in rows))

    def plot(axes: Axes) -> str:
        step = 0.7 / len(shown)
        for number, (group, rows) in enumerate(shown):
            color = color_of(group)
            for row in rows:
                y = names.index((row["kind"], row["name"]))
                y_own = y + (number - (len(shown) - 1) / 2) * step
                _difference(axes, row, y_own, color)
            axes.plot([], [], "o-", color=color, label=named(group))
        axes.axvline(0, color=MUTED, linewidth=1)
        axes.set_yticks(range(len(names)), [short(_place(*name), 24) for name in names])
        axes.set_ylim(len(names) - 0.5, -0.5)
        axes.grid(visible=False, axis="y")
        axes.grid(visible=True, axis="x")
        axes.tick_params(axis="y", length=0)
        axes.set_xlabel(f"{unit} (below 0: better)")
        axes.xaxis.set_major_locator(MaxNLocator(6))
        if len(shown) > 1:
            legend(axes)
        return "Differences to cross entropy with intervals; the tables below have the numbers."

    height = 1.2 + (0.26 + 0.12 * len(shown)) * len(names)
    return draw(name, plot, *_row_cells(shown), height=height)


def _difference(axes: Axes, row: Data, y: float, color: str) -> None:
    if row["low"] is not None:
        axes.plot([row["low"], row["high"]], [y, y], color=color, linewidth=2.2)
    axes.plot(row["difference"], y, "o", color=color, markersize=5)


def _place(kind: str, name: str) -> str:
    return f"{name}-frequency" if kind == "bucket" else name
