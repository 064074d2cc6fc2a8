"""Run folders in, one self-contained page out, and beside it what the page is made of.

    NAME.html            the page: figures are inline SVG, styles are inline; no network, no scripts
    NAME.json            everything the page shows, as one plain structure
    NAME.figures/*.svg   every figure as a file of its own, and as *.csv the numbers that it shows

Verdict, tables and figures are functions of that structure. The page stands alone; its links to the
figures' files need them beside it. Every figure is one panel, so that a phone can show it in full
width.
"""

import json
import shlex
from collections.abc import Sequence
from inspect import isfunction
from pathlib import Path
from typing import Any

import matplotlib as mpl
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from megatron_infoentropy.evaluate import plots, wording
from megatron_infoentropy.evaluate.figure import STYLE, Data, Figure, write_figures
from megatron_infoentropy.evaluate.report_data import report_data
from megatron_infoentropy.evaluate.runs import load_run
from megatron_infoentropy.files import write_whole


def write_report(runs: list[Path], output: Path, *, notes: Sequence[str] = ()) -> Path:
    """Compare run folders on one HTML page.

    Args:
        runs: folders with run.json, and where they are there train.log and evaluation.json/.npz.
        output: the page, or a folder to write report.html into; the JSON and the folder of figures
            come beside it, under the page's name.
        notes: sentences that the page must not leave out, such as which planned runs are missing.

    Returns:
        The path of the page.

    Raises:
        ValueError: no runs, or a folder that is no run or holds a damaged evaluation.
    """
    if not runs:
        raise ValueError("a report needs at least one run folder, got none")
    page = output if output.suffix in (".html", ".htm") else output / "report.html"
    data = report_data([load_run(folder) for folder in runs], notes)
    write_whole(page.with_suffix(".json"), json.dumps(data, indent=1, allow_nan=False) + "\n")
    figures = all_figures(data)
    write_figures([figure for figure in figures.values() if figure], page.with_suffix(".figures"))
    write_whole(page, render_report(data, figures, page.stem))
    return page


# The one beside the three answers: the first of these that there is.
_FIRST_FIGURES = ("difficulty", "tasks", "training")


@mpl.rc_context(STYLE)
def all_figures(data: Data) -> dict[str, Figure | None]:
    """Return the figures by their names on the page, None without anything to draw."""
    return {
        "training": plots.training_curves(data, "cross entropy"),
        "training_objective": plots.training_curves(data, "objective"),
        "entropies": plots.distribution_over_training(data, "entropy"),
        "weights_in_training": plots.distribution_over_training(data, "weight"),
        "differences": plots.differences(data, "differences"),
        "tasks": plots.differences(data, "differences-by-task"),
        "deciles": plots.differences(data, "differences-by-decile"),
        "difficulty": plots.differences(data, "differences-by-difficulty"),
        "weights": plots.weights_over_entropy(data),
        "calibration": plots.entropy_calibration(data),
    }


def render_report(data: dict[str, Any], figures: dict[str, Figure | None], stem: str) -> str:
    """Render the page as HTML; everything in `data` is escaped, only our own figures are markup.

    stem: of the page's name and those of the files beside it.
    """
    environment = Environment(
        loader=PackageLoader("megatron_infoentropy", "evaluate"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    functions = {name: one for name, one in vars(wording).items() if isfunction(one)}
    environment.filters.update(functions)
    environment.filters["quote"] = shlex.quote
    drawn = {
        name: {"name": figure.name, "svg": Markup(figure.svg)} if figure else None
        for name, figure in figures.items()
    }
    domains = {name: None for group in data["groups"] for name in group["scores"]["domains"]}
    return environment.get_template("report.html.jinja").render(
        **data,
        domains=list(domains),
        letters={group["label"]: group["letter"] for group in data["groups"]},
        title=_title(data),
        stem=stem,
        figures=drawn,
        first_figure=next((name for name in _FIRST_FIGURES if figures[name]), None),
    )


def _title(data: dict[str, Any]) -> str:
    first = [data["runs"][group["runs"][0]] for group in data["groups"]]
    labels = list(dict.fromkeys(run["objective_label"] for run in first))
    if len(labels) == 1:
        return f"Training with {labels[0]}"
    others = labels[1:] if data["groups"][0]["is_baseline"] else labels
    named = " and ".join(others) if len(others) < 3 else f"{len(others)} objectives"
    return f"{named} against cross entropy" if others != labels else named
