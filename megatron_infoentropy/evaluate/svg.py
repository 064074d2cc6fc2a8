"""One matplotlib panel as an SVG element that lives in a page.

Text stays text, in the reader's font; every colour is a CSS variable with the light theme's value
as its fallback, so that a figure follows its page into the dark and still stands alone.
"""

import html
import io
import re
from collections.abc import Callable
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

PAGE, INK, MUTED, GRID, FILL = "#fefefe", "#24292f", "#59636e", "#d9dee3", "#e6eaee"
# Okabe and Ito's palette, told apart by readers with any of the common colour deficiencies,
# and two of Tol's.
SERIES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#882255", "#777777")
_FONT = "system-ui, sans-serif"
_STYLE: dict[Any, Any] = {
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
    "legend.facecolor": PAGE,
    "legend.edgecolor": "none",
    "legend.framealpha": 1.0,
    "legend.fancybox": False,
    "legend.fontsize": 10,
    "lines.linewidth": 1.6,
    "lines.solid_capstyle": "round",
    "svg.fonttype": "none",
    "svg.hashsalt": "infoentropy",
}


def draw(name: str, plot: Callable[[Axes], str], *, height: float = 3.5) -> str:
    """Draw one panel and return it as an SVG element.

    Args:
        name: of the figure; prefixes its ids, so that several figures can share a page.
        plot: draws on the axes it is given and returns what a reader who cannot see it is told.
        height: inches, at a width of 5.6.
    """
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(5.6, height), layout="constrained")
        alternative = plot(figure.add_subplot())
        target = io.StringIO()
        nothing = {"Date": None, "Creator": None, "Format": None, "Type": None}
        figure.savefig(target, format="svg", transparent=True, metadata=nothing)
    return _inline(target.getvalue(), name, alternative)


def standalone(svg: str) -> str:
    """The same figure for a file of its own: in the light theme's colours, on paper."""
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
    """A tag with ids of the figure's own, the reader's font and colours of the page."""
    tag = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", tag)
    tag = tag.replace("'DejaVu Sans'", _FONT)
    for variable, color in _variables().items():
        tag = re.sub(rf"(?<=[: ]){color}\b", f"var(--{variable}, {color})", tag)
    return tag


def _variables() -> dict[str, str]:
    plain = {"page": PAGE, "ink": INK, "muted": MUTED, "grid": GRID, "fill": FILL}
    return plain | {f"series-{i}": color for i, color in enumerate(SERIES, start=1)}
