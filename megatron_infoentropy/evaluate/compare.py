"""`infoentropy compare`: folders in, settings against the first of them, tables and a verdict out.

A folder is a run folder, whose objective, set-up and seed are known from run.json, so that runs of
one setting are put together; or any folder with an evaluation, which is a setting of its own.
Folders joined by commas are the seeds of one setting, in the order of the seeds.
"""

import csv
import io
import json
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from megatron_infoentropy.evaluate.comparison import (
    Comparison,
    Group,
    Row,
    compare_pairs,
    group_runs,
)
from megatron_infoentropy.evaluate.errors import RunFolderError
from megatron_infoentropy.evaluate.evaluation import load_evaluation
from megatron_infoentropy.evaluate.files import write_atomically
from megatron_infoentropy.evaluate.runlog import TrainingLog
from megatron_infoentropy.evaluate.runs import Run, load_run

FORMAT = 1


def compare_folders(
    names: list[str], *, difficulty_from: Path | None = None, output: Path | None = None
) -> list[Comparison]:
    """Compare every further setting with the first one.

    Args:
        names: folders, or folders joined by commas; see the module's text.
        difficulty_from: an evaluation of the same tokens by whose entropy they are easy or hard;
            default: the mean entropy of the evaluations compared.
        output: folder to write comparison.json and comparison.csv into.

    Raises:
        ValueError: fewer than two settings, a folder without an evaluation, or settings that cannot
            be compared, in which case the reason is named.
    """
    groups = _groups(names)
    if len(groups) < 2:
        raise RunFolderError(
            f"expected folders of at least two settings, got {len(groups)}: "
            f"{', '.join(group.label for group in groups)}"
        )
    references = None if difficulty_from is None else [load_evaluation(difficulty_from)]
    first, *others = groups
    made = compare_pairs([(group, first) for group in others], references)
    for comparison in made:
        if comparison.refusal:
            raise ValueError(
                f"{comparison.group} and {comparison.baseline} cannot be compared: "
                f"{comparison.refusal}"
            )
    if output is not None:
        _write(made, output)
    return made


def verdict_line(comparison: Comparison) -> str:
    """What is shown over all tokens, and what could have been, in one or two sentences."""
    total = comparison.rows[0]
    against = f"{comparison.group} against {comparison.baseline}, all tokens"
    if total.p is None:
        return f"{against}: too few documents ({total.documents}) to tell"
    interval = (
        f"{total.difference:+.4f} nats per token, 95 % {total.low:+.4f} to {total.high:+.4f}, "
        f"p {total.p_adjusted:.2g}"
    )
    seeds = len(comparison.seeds)
    sample = f"{total.documents} documents and {seeds} seed{'s' if seeds > 1 else ''}"
    words = {
        "seed noise unknown": "a difference between these two models, which other seeds may not "
        "show: with one seed nothing is known of them"
    }
    text = f"{against}: {words.get(total.reading, total.reading)} ({interval})"
    if total.detectable:
        text += (
            f"; with {sample} a true difference of {total.detectable:.4f} nats "
            f"({100 * total.detectable:.2g} % of perplexity) would be shown in 80 of 100 cases"
        )
    return text


def shown_rows(comparison: Comparison) -> list[Row]:
    """The differences besides the total that are shown after the correction."""
    return [row for row in comparison.rows[1:] if row.reading in ("better", "worse")]


def _groups(names: list[str]) -> list[Group]:
    """Settings in the order of their first folder."""
    groups: list[Group] = []
    runs: list[Run] = []
    for name in names:
        folders = [Path(part) for part in name.split(",") if part]
        if len(folders) == 1 and (folders[0] / "run.json").is_file():
            run = load_run(folders[0])
            if run.evaluation is None:
                raise RunFolderError(
                    f"{run.folder} has not been evaluated: run `infoentropy evaluate` on its model "
                    f"with --output {run.folder}"
                )
            runs.append(run)
        else:
            groups.append(_group_of(name, folders))
    found = {run.folder: group for group in group_runs(runs) for run in group.runs}
    by_name = {group.label: group for group in groups}
    ordered = [by_name[name] if name in by_name else found.get(Path(name)) for name in names]
    return list({group.label: group for group in ordered if group is not None}.values())


def _group_of(name: str, folders: list[Path]) -> Group:
    runs = [
        Run(folder, {"name": folder.name, "seed": seed}, TrainingLog(), load_evaluation(folder))
        for seed, folder in enumerate(folders, start=1)
    ]
    return Group(name, is_baseline=False, runs=runs, repeated=[])


def _write(comparisons: list[Comparison], output: Path) -> None:
    content: dict[str, Any] = {
        "format": FORMAT,
        "comparisons": [
            asdict(comparison) | {"verdict": verdict_line(comparison)} for comparison in comparisons
        ],
    }
    with write_atomically(output / "comparison.json") as temporary:
        text = json.dumps(content, indent=1, allow_nan=False)
        temporary.write_text(text + "\n", encoding="utf-8")
    names = [field.name for field in fields(Row)]
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    # `group` is a column of Row, its nats; the settings' names come first.
    writer.writerow(["setting", "against", *names])
    for comparison in comparisons:
        for row in comparison.rows:
            values = [getattr(row, name) for name in names]
            writer.writerow([comparison.group, comparison.baseline, *values])
    with write_atomically(output / "comparison.csv") as temporary:
        temporary.write_text(table.getvalue(), encoding="utf-8")
