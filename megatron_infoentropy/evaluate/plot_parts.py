"""What the report's plots share: colours of groups, dashes, thinned curves, a histogram behind."""

import textwrap
from typing import Any, Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, MaxNLocator
from numpy.typing import NDArray

from megatron_infoentropy.evaluate.svg import FILL, SERIES

Data = dict[str, Any]

DASHES: tuple[Any, ...] = ("solid", (0, (5, 1.6)), (0, (1.6, 1.4)), (0, (6, 1.6, 1.4, 1.6)))
_MOST_POINTS = 400
_LINE, _HALF_LINE = 66, 28  # characters that fit into a figure's width beside a legend's handle
_LINE_HEIGHT = 0.19  # inches


def color_of(group: Data) -> str:
    return SERIES[group["color"] - 1]


def named(group: Data) -> str:
    """As the page's key names a group: its letter, and what it is."""
    return f"{group['letter']} {group['label']}"


def legend(axes: Axes, inside: Literal["upper left", "upper right"] | None = None) -> None:
    """The legend, above the panel or, where its lines are short, `inside`; none is cut."""
    handles, labels = axes.get_legend_handles_labels()
    longest = max(map(len, labels))
    if inside and longest <= _HALF_LINE:
        axes.legend(loc=inside)
        return
    columns = 2 if longest <= _HALF_LINE else 1
    wrapped = [textwrap.fill(label, _LINE) for label in labels]
    lines = sum(label.count("\n") + 1 for label in wrapped) / columns
    figure = axes.get_figure(root=True)
    assert figure is not None
    figure.set_figheight(figure.get_figheight() + _LINE_HEIGHT * max(0, lines - 2))
    figure.legend(handles, wrapped, loc="outside upper left", ncols=columns)


def legend_label(name: str) -> str:
    """Return a name that matplotlib shows: a label that begins with _ is left out of a legend."""
    return f"\N{HAIR SPACE}{name}" if name.startswith("_") else name


def short(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 3] + "..."


def evaluated_groups(data: Data) -> list[Data]:
    return [group for group in data["groups"] if group["evaluated"]]


def first_evaluation(data: Data, group: Data) -> Data:
    """Of the first evaluated run of a group."""
    evaluation: Data = data["runs"][group["evaluated"][0]]["evaluation"]
    return evaluation


def thin(series: Data) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """A curve of at most `_MOST_POINTS` points, each the mean of a block of logged ones."""
    steps, values = (np.array(series[name], dtype=float) for name in ("iterations", "values"))
    block = -(-len(steps) // _MOST_POINTS)
    starts = np.arange(0, len(steps), block)
    sizes = np.diff(np.append(starts, len(steps)))
    return np.add.reduceat(steps, starts) / sizes, np.add.reduceat(values, starts) / sizes


def step_axis(axes: Axes) -> None:
    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True, steps=[1, 2, 5, 10]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))


def histogram_behind(axes: Axes, histogram: Data) -> None:
    """Shares of tokens by entropy, as a pale area of half the panel's height without an axis."""
    behind = axes.twinx()
    tokens = np.array(histogram["tokens"], dtype=float)
    behind.stairs(tokens / tokens.max(), histogram["edges"], fill=True, color=FILL)
    behind.set_ylim(0, 2)
    behind.set_axis_off()
    axes.set_zorder(behind.get_zorder() + 1)
    axes.patch.set_visible(False)
