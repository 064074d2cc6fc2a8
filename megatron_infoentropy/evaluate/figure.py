"""A figure of the report: one matplotlib panel as an SVG element, and the numbers it is drawn from.

Text stays text, in the reader's font; every colour is a CSS variable with the light theme's value
as its fallback, so that a figure follows its page into the dark and still stands alone. Below are
the parts that the plots share: colours of groups, thinned curves, a histogram behind.
"""

import csv
import html
import io
import re
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib.figure
import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, MaxNLocator
from numpy.typing import NDArray

from megatron_infoentropy.files import write_whole

PAGE, INK, MUTED, GRID, FILL = "#fefefe", "#24292f", "#59636e", "#d9dee3", "#e6eaee"
# Okabe and Ito's palette, told apart by readers with any of the common colour deficiencies,
# and two of Tol's.
SERIES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#882255", "#777777")
_VARIABLES = {PAGE: "page", INK: "ink", MUTED: "muted", GRID: "grid", FILL: "fill"} | {
    color: f"series-{number}" for number, color in enumerate(SERIES, start=1)
}
_COLOR = re.compile(rf"(?<=[: ])({'|'.join(_VARIABLES)})\b")

Data = dict[str, Any]

DASHES: tuple[Any, ...] = ("solid", (0, (5, 1.6)), (0, (1.6, 1.4)))
_MOST_POINTS = 400
_LINE, _HALF_LINE = 66, 28  # characters that fit into a figure's width beside a legend's handle
_LINE_HEIGHT = 0.19  # inches
_FONT = "system-ui, sans-serif"
STYLE: dict[Any, Any] = {
    "font.family": ["DejaVu Sans"],
    "font.size": 11,
    "text.parse_math": False,  # a run called "a$b$" is no formula
    "text.color": INK,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.titlesize": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "axes.unicode_minus": True,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "legend.frameon": False,
    "legend.fontsize": 10,
    "lines.linewidth": 1.6,
    "lines.solid_capstyle": "round",
    "svg.fonttype": "none",
    "svg.hashsalt": "infoentropy",
}


@dataclass(frozen=True)
class Figure:
    """One panel; `rows` are the numbers it shows, None where one is missing."""

    name: str  # of the files, and before the ids in the SVG
    svg: str
    rows: Sequence[Data]

    def csv(self) -> str:
        """Return the numbers, with a line of column names."""
        text = io.StringIO()
        columns = list(self.rows[0]) if self.rows else []
        writer = csv.DictWriter(text, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.rows)
        return text.getvalue()


def write_figures(figures: Sequence[Figure], folder: Path) -> None:
    """Write FOLDER/NAME.svg and FOLDER/NAME.csv of every figure, and leave no older ones there."""
    for figure in figures:
        write_whole(folder / f"{figure.name}.svg", standalone(figure.svg))
        write_whole(folder / f"{figure.name}.csv", figure.csv())
    names = {figure.name for figure in figures}
    for path in folder.glob("*"):
        if path.suffix in (".svg", ".csv") and path.stem not in names:
            path.unlink()


def panel(height: float = 3.5) -> Axes:
    """Return an empty panel, 5.6 inches wide; draw and finish it in the style `STYLE`."""
    return matplotlib.figure.Figure(figsize=(5.6, height), layout="constrained").add_subplot()


def finished(name: str, axes: Axes, alternative: str, rows: Sequence[Data]) -> Figure:
    """Return the panel as SVG, with its numbers.

    Args:
        name: of the figure; prefixes its ids, so that several figures can share a page.
        axes: the panel.
        alternative: what a reader who cannot see it is told.
        rows: the numbers that are drawn.
    """
    target, figure = io.StringIO(), axes.get_figure(root=True)
    assert figure is not None
    nothing = {"Date": None, "Creator": None, "Format": None, "Type": None}
    figure.savefig(target, format="svg", transparent=True, metadata=nothing)
    return Figure(name, _inline(target.getvalue(), name, alternative), rows)


def standalone(svg: str) -> str:
    """Return the figure for a file of its own: in the light theme's colours, on paper."""
    svg = re.sub(r"var\(--[\w-]+, (#[0-9a-f]{6})\)", r"\1", svg)
    end = svg.index(">") + 1
    return f'{svg[:end]}<rect width="100%" height="100%" fill="{PAGE}"/>{svg[end:]}\n'


def _inline(svg: str, name: str, alternative: str) -> str:
    svg = re.sub(r"<!--.*?-->", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    svg = re.sub(r'(?<=<svg) [^>]*?(viewBox="[^"]*")[^>]*>', r" \1>", svg, count=1)
    label = html.escape(alternative, quote=True)
    spaces = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    svg = re.sub("<[^>]*>", lambda tag: _adapt(tag[0], name), svg)  # not the text between them
    return svg.replace("<svg", f'<svg {spaces} role="img" aria-label="{label}"', 1).strip()


def _adapt(tag: str, name: str) -> str:
    """Return a tag with ids of the figure's own, the reader's font and the page's colours."""
    tag = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", tag)
    tag = tag.replace("'DejaVu Sans'", _FONT)
    return _COLOR.sub(lambda color: f"var(--{_VARIABLES[color[0]]}, {color[0]})", tag)


def color_of(group: Data) -> str:
    return SERIES[group["color"] - 1]


def named(group: Data) -> str:
    """Return a group's name in the page's key: its letter, and what it is."""
    return f"{group['letter']} {group['label']}"


def legend(axes: Axes) -> None:
    """Draw the legend above the panel, where it hides no curve; none is cut."""
    handles, labels = axes.get_legend_handles_labels()
    columns = 2 if max(map(len, labels)) <= _HALF_LINE else 1
    wrapped = [textwrap.fill(label, _LINE) for label in labels]
    lines = sum(label.count("\n") + 1 for label in wrapped) / columns
    figure = axes.get_figure(root=True)
    assert figure is not None
    figure.set_figheight(figure.get_figheight() + _LINE_HEIGHT * max(0, lines - 2))
    figure.legend(handles, wrapped, loc="outside upper left", ncols=columns)


def short(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 3] + "..."


def thin(series: Data) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return a curve of at most 400 points, each the mean of a block of logged ones."""
    steps, values = (np.array(series[name], dtype=float) for name in ("iterations", "values"))
    block = max(1, -(-len(steps) // _MOST_POINTS))
    starts = np.arange(0, len(steps), block)
    sizes = np.diff(np.append(starts, len(steps)))
    return np.add.reduceat(steps, starts) / sizes, np.add.reduceat(values, starts) / sizes


def step_axis(axes: Axes) -> None:
    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True, steps=[1, 2, 5, 10]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))


def histogram_behind(axes: Axes, histogram: Data) -> None:
    """Draw the tokens' entropies as a pale area of half the panel's height, without an axis."""
    behind = axes.twinx()
    tokens = np.array(histogram["tokens"], dtype=float)
    behind.stairs(tokens / tokens.max(), histogram["edges"], fill=True, color=FILL)
    behind.set_ylim(0, 2)
    behind.set_axis_off()
    axes.set_zorder(behind.get_zorder() + 1)
    axes.patch.set_visible(False)
