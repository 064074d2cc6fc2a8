"""Run folders in, one self-contained page out, and beside it what the page is made of.

    NAME.html            the page: figures are inline SVG, styles are inline; no network, no scripts
    NAME.json            everything the page shows, as one plain structure
    NAME.figures/*.svg   every figure as a file of its own, and as *.csv the numbers that it shows

Verdict, tables and figures are functions of that structure. The page stands alone; its links to the
figures' files need them beside it.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from string import ascii_uppercase
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from megatron_infoentropy import __version__
from megatron_infoentropy.evaluate import verdict, wording
from megatron_infoentropy.evaluate.comparison import compare_groups
from megatron_infoentropy.evaluate.figure import Figure, write_figures
from megatron_infoentropy.evaluate.group_scores import intervals_over_documents, mean_scores
from megatron_infoentropy.evaluate.groups import Group, group_runs
from megatron_infoentropy.evaluate.plots import all_figures
from megatron_infoentropy.evaluate.runlog import Values
from megatron_infoentropy.evaluate.runs import Run, load_run
from megatron_infoentropy.evaluate.svg import SERIES
from megatron_infoentropy.evaluate.task_table import task_table
from megatron_infoentropy.evaluate.weights import (
    final_loss,
    may_draw,
    weigh_passage,
    weight_curves,
)
from megatron_infoentropy.files import write_atomically

FORMAT = 3
_MOST_PASSAGES = 3
_TEMPLATE = "report.html.jinja"


def write_report(
    runs: list[Path],
    output: Path,
    *,
    notes: Sequence[str] = (),
    weightings: Sequence[str] = (),
) -> Path:
    """Compare run folders on one HTML page.

    Args:
        runs: folders with run.json, and where they are there train.log and evaluation.json/.npz.
        output: the page, or a folder to write report.html into; the JSON and the folder of figures
            come beside it, under the page's name.
        notes: sentences that the page must not leave out, such as which planned runs are missing.
        weightings: the custom weightings (package.module:function) that may be imported and called,
            for runs that were trained with them; a run folder alone makes nothing run.

    Returns:
        The path of the page.

    Raises:
        ValueError: no runs, a folder that is no run or holds a damaged evaluation, or a weighting
            that cannot be called.
    """
    if not runs:
        raise ValueError("a report needs at least one run folder, got none")
    page = output if output.suffix in (".html", ".htm") else output / "report.html"
    data = report_data([load_run(folder) for folder in runs], notes, weightings)
    with write_atomically(page.with_suffix(".json")) as temporary:
        temporary.write_text(json.dumps(data, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    figures = all_figures(data)
    write_figures([figure for figure in figures.values() if figure], page.with_suffix(".figures"))
    with write_atomically(page) as temporary:
        temporary.write_text(render_report(data, figures, page.stem), encoding="utf-8")
    return page


def report_data(
    runs: list[Run], notes: Sequence[str] = (), weightings: Sequence[str] = ()
) -> dict[str, Any]:
    """Everything the page shows, as JSON values; numbers that are not finite become None."""
    groups = group_runs(runs)
    comparisons = compare_groups(groups)
    first_color = 0 if groups[0].is_baseline else 1  # the first is cross entropy's, always
    position = {id(run): index for index, run in enumerate(runs)}
    group_of = {
        id(run): index
        for index, group in enumerate(groups)
        for run in (*group.runs, *group.repeated)
    }
    data = {
        "format": FORMAT,
        "version": __version__,
        "verdict": {
            "headline": verdict.headline(runs, comparisons),
            "smallest_effects": verdict.smallest_effects(comparisons),
            "findings": [[asdict(finding) for finding in verdict.findings(c)] for c in comparisons],
            "matched": [verdict.how_matched(c) for c in comparisons],
            "chances": verdict.chances(comparisons),
            "limits": [
                *notes,
                *verdict.limits(runs, groups, comparisons),
                *_weights_not_drawn(groups, weightings),
            ],
        },
        "groups": [
            _describe_group(group, place, place + first_color, position)
            for place, group in enumerate(groups)
        ],
        "runs": [_describe_run(run, group_of[id(run)]) for run in runs],
        "comparisons": [asdict(comparison) for comparison in comparisons],
        "weights": weight_curves(runs, weightings),
        "passages": _passages(groups, weightings),
        "tasks": task_table([group.runs for group in groups]),
    }
    finite = _finite(data)
    assert isinstance(finite, dict)
    return finite


def render_report(data: dict[str, Any], figures: dict[str, Figure | None], stem: str) -> str:
    """The page as HTML; everything in `data` is escaped, only our own figures are markup.

    stem: of the page's name and those of the files beside it.
    """
    environment = Environment(
        loader=PackageLoader("megatron_infoentropy", "evaluate"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    for name in wording.__all__:
        environment.filters[name] = getattr(wording, name)
    drawn = {
        name: {"name": figure.name, "svg": Markup(figure.svg)} if figure else None
        for name, figure in figures.items()
    }
    domains = {name: None for group in data["groups"] for name in group["scores"]["domains"]}
    return environment.get_template(_TEMPLATE).render(
        **data,
        domains=list(domains),
        letters={group["label"]: group["letter"] for group in data["groups"]},
        title=_title(data),
        stem=stem,
        figures=drawn,
    )


def _title(data: dict[str, Any]) -> str:
    first = [data["runs"][group["runs"][0]] for group in data["groups"]]
    labels = list(dict.fromkeys(run["objective_label"] for run in first))
    if len(labels) == 1:
        return f"Training with {labels[0]}"
    others = labels[1:] if data["groups"][0]["is_baseline"] else labels
    named = " and ".join(others) if len(others) < 3 else f"{len(others)} objectives"
    return f"{named} against cross entropy" if others != labels else named


def _describe_group(
    group: Group, place: int, color: int, position: dict[int, int]
) -> dict[str, Any]:
    """A group by its runs' places in the report; `color` counts the figures' series from 1."""
    evaluations = [run.evaluation for run in group.evaluated if run.evaluation]
    return {
        "label": group.label,
        "letter": ascii_uppercase[place % 26] * (place // 26 + 1),
        "is_baseline": group.is_baseline,
        "color": color % len(SERIES) + 1,
        "runs": [position[id(run)] for run in group.runs],
        "evaluated": [position[id(run)] for run in group.evaluated],
        "repeated": [position[id(run)] for run in group.repeated],
        "scores": mean_scores(evaluations),
        "intervals": intervals_over_documents(evaluations) if evaluations else {},
    }


def _weights_not_drawn(groups: list[Group], weightings: Sequence[str]) -> list[str]:
    """A sentence for every setting whose weighting would have to be imported."""
    losses = {group.label: final_loss(group.runs[0]) for group in groups}
    return [
        f"The weights of {label} are not drawn, as that takes its code: name it with --weighting."
        for label, loss in losses.items()
        if not may_draw(loss, weightings)
    ]


def _passages(groups: list[Group], weightings: Sequence[str]) -> list[dict[str, Any]]:
    """One for each weighted objective, by its first evaluated run."""
    first = [(group.label, group.evaluated[0]) for group in groups if group.evaluated]
    found = [weigh_passage(label, run, weightings) for label, run in first]
    return [passage for passage in found if passage][:_MOST_PASSAGES]


def _describe_run(run: Run, group: int) -> dict[str, Any]:
    return {
        "name": run.name,
        "group": group,
        "objective_label": run.objective_label,
        "stages": [
            {"from_step": stage.from_step, "loss": asdict(stage.loss), "seed": stage.seed}
            for stage in run.stages
        ],
        "info": run.info | {"command": _portable(run)},
        "last_iteration": run.log.last_iteration,
        "tokens_seen": run.tokens_seen,
        "training": _series(run.log.training),
        "validation": _series(run.log.validation),
        "observed": _series(run.log.observed),
        "evaluation": run.evaluation.summary if run.evaluation else None,
    }


def _portable(run: Run) -> list[str]:
    """The command with paths as seen from here, or from beside the run: a page gets around."""
    words = []
    for word in map(str, run.info["command"]):
        path = Path(word)
        roots = [r for r in (Path.cwd(), run.folder.resolve().parent) if path.is_relative_to(r)]
        if path.is_absolute() and path.name.startswith("python"):
            words.append("python")
        else:
            words.append(str(path.relative_to(roots[0])) if roots else word)
    return words


def _series(logged: dict[int, Values]) -> dict[str, dict[str, list[float]]]:
    """Every number of a log as iterations and values, those that are not finite left out."""
    result: dict[str, dict[str, list[float]]] = {}
    for iteration, values in sorted(logged.items()):
        for name, value in values.items():
            if math.isfinite(value):
                series = result.setdefault(name, {"iterations": [], "values": []})
                series["iterations"].append(float(iteration))
                series["values"].append(value)
    return result


def _finite(value: object) -> object:
    """The same structure with None for what JSON has no word for."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {name: _finite(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    return value
