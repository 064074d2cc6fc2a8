"""A result file as one picture: who takes how long at the first shape, and, where a grid was run,
how near our kernels come to what bounds them at every shape."""

import io
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from megatron_infoentropy.bench.results import Row, read_csv
from megatron_infoentropy.bench.table import number

PAGE, INK, MUTED, GRID = "#ffffff", "#24292f", "#59636e", "#d9dee3"
# forward, backward: ours in blue, the others in grey
SHADES = {"ours": ("#0072b2", "#7fb8d8"), "peer": ("#8a929a", "#c8cdd2")}
KERNELS = {"statistics": "#0072b2", "gradient": "#d55e00", "gradient in place": "#009e73"}
STYLE: dict[Any, Any] = {
    "font.family": ["DejaVu Sans"],
    "font.size": 10,
    "text.color": INK,
    "axes.edgecolor": MUTED,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.grid.axis": "x",
    "grid.color": GRID,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "legend.frameon": False,
    "figure.facecolor": PAGE,
    "savefig.facecolor": PAGE,
    "svg.fonttype": "none",
    "svg.hashsalt": "infoentropy",
}


def plot(result_file: Path, picture: Path) -> None:
    """Draw the rows of a result file into an .svg or .png; the same file gives the same bytes."""
    rows, facts = read_csv(result_file)
    first = [row for row in rows if row.case == rows[0].case]
    bars = sorted(
        (row for row in first if row.kind == "loss" and row.step == "both"),
        key=lambda row: row.median_ms or 0,
    )
    kernels = [row for row in rows if row.kind == "kernel" and row.provider != "reference"]
    shares = [row for row in kernels if row.percent_of_limit is not None]
    is_grid = len({row.case for row in shares}) > 3
    with mpl.rc_context(STYLE):
        height = 1.5 + 0.27 * len(bars)
        figure = Figure(figsize=(11 if is_grid else 7.4, height), layout="constrained")
        panels = figure.subplots(1, 2 if is_grid else 1, squeeze=False)[0]
        _draw_times(panels[0], bars, first)
        if is_grid:
            _draw_shares(panels[1], shares)
        figure.suptitle(_caption(rows[0], facts), x=0.01, ha="left", fontsize=8, color=MUTED)
        _save(figure, picture)


def _draw_times(axes: Axes, bars: list[Row], rows: list[Row]) -> None:
    ms = {(row.provider, row.step): row.median_ms for row in rows if row.kind == "loss"}
    longest = max(row.median_ms or 0 for row in bars)
    for place, row in enumerate(bars):
        dark, light = SHADES["ours" if row.by == "ours" else "peer"]
        both = row.median_ms or 0.0
        forward = ms.get((row.provider, "forward")) or both
        backward = ms.get((row.provider, "backward")) or 0.0
        # Medians of the steps need not add up to the median of the whole: the whole is the bar.
        end_of_forward = both * forward / (forward + backward)
        axes.barh(place, both, color=light, height=0.72)
        axes.barh(place, end_of_forward, color=dark, height=0.72)
        words = f"{number(row.median_ms)} ms"
        if row.times_in_place is not None:
            words += f"  {number(row.times_in_place)}x"
        axes.text(both + 0.012 * longest, place, words, va="center", fontsize=8.5)
    names = [
        f"{row.provider} *" if row.computes != "cross entropy" else row.provider for row in bars
    ]
    axes.set_yticks(range(len(bars)), names)
    axes.set_ylim(len(bars) - 0.4, -0.6)
    axes.set_xlim(0, 1.32 * longest)
    axes.set_xlabel("ms, median; x: times ours in place;  *: with the entropy")
    axes.set_title(f"forward + backward, {bars[0].case}")
    keys = [
        Patch(color=SHADES[by][step], label=f"{who}, {word}")
        for by, who in (("ours", "ours"), ("peer", "others"))
        for step, word in enumerate(("forward", "backward"))
    ]
    axes.legend(handles=keys, loc="upper right", fontsize=8.5)


def _draw_shares(axes: Axes, shares: list[Row]) -> None:
    markers = dict(zip(dict.fromkeys(row.provider for row in shares), "os^Dv", strict=False))
    for row in shares:
        size = row.tokens * row.case.columns * (4 if row.dtype == "float32" else 2) / 2**20
        axes.plot(size, row.percent_of_limit or 0, markers[row.provider], ms=5,
                  color=KERNELS[row.step], alpha=0.85)  # fmt: skip
    for provider, marker in markers.items():
        for step, color in KERNELS.items():
            axes.plot([], [], marker, color=color, label=f"{provider} {step}", ms=5)
    axes.axhline(100, color=MUTED, linewidth=1)
    axes.set_xscale("log", base=2)
    axes.set_ylim(0, 130)
    axes.grid(visible=True, axis="y")
    axes.set(xlabel="MiB of logits", title="kernels alone, % of the limit measured beside them")
    axes.legend(loc="upper left", fontsize=8.5, ncols=2)


def _caption(row: Row, facts: dict[str, str]) -> str:
    return (
        f"{facts['device']}, {row.threads} threads, torch {facts['torch']}, {facts['date']}, "
        f"commit {facts['commit']}"
    )


def _save(figure: Figure, picture: Path) -> None:
    target = io.BytesIO()
    metadata = {"Date": None} if picture.suffix == ".svg" else None
    figure.savefig(target, format=picture.suffix[1:], metadata=metadata, dpi=150)
    unfinished = picture.with_name(picture.name + ".part")
    unfinished.write_bytes(target.getvalue())
    unfinished.replace(picture)
