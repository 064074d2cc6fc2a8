"""`infoentropy compare`: folders in, settings against the first of them, tables and answers out.

A folder is a run folder, whose objective, set-up and seed are known from run.json, so that runs of
one setting are put together; or any folder with an evaluation, or with answers to tasks, which is a
setting of its own.
Folders joined by commas are the seeds of one setting: by run.json where all have one, which also
gives its name, otherwise in the order of the seeds.
"""

import json
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path

from megatron_infoentropy.evaluate.comparison import Comparison, compare_pairs
from megatron_infoentropy.evaluate.evaluation import SUMMARY_FILE, load_evaluation
from megatron_infoentropy.evaluate.groups import Group, group_runs
from megatron_infoentropy.evaluate.runlog import TrainingLog
from megatron_infoentropy.evaluate.runs import Run, load_run
from megatron_infoentropy.evaluate.task_comparison import compare_tasks
from megatron_infoentropy.evaluate.verdict import answers
from megatron_infoentropy.files import write_whole
from megatron_infoentropy.tasks.results import load_results

FORMAT = 3


def compare_folders(names: list[str], *, output: Path | None = None) -> list[Comparison]:
    """Compare every further setting with the first one.

    Args:
        names: folders, or folders joined by commas; see the module's text.
        output: folder to write comparison.json into.

    Raises:
        ValueError: fewer than two settings, a folder without an evaluation and answers, or settings
            of which neither can be compared, in which case the reason is named.
    """
    groups = _groups(names)
    if len(groups) < 2:
        raise ValueError(
            f"expected folders of at least two settings, got {len(groups)}: "
            f"{', '.join(group.label for group in groups)}"
        )
    first, *others = groups
    pairs: list[tuple[Group, Group | None]] = [(group, first) for group in others]
    made = compare_pairs(pairs) if any(group.evaluated for group in groups) else []
    if any(run.tasks for group in groups for run in group.runs):
        made += compare_tasks(pairs)
    for comparison in made:
        of_pair = [c for c in made if c.group == comparison.group]
        if all(c.refusal for c in of_pair):
            raise ValueError(
                f"{comparison.group} and {first.label} cannot be compared: {comparison.refusal}"
            )
    if output is not None:
        content = {
            "format": FORMAT,
            "answers": answers(made),
            "comparisons": list(map(asdict, made)),
        }
        text = json.dumps(content, indent=1, allow_nan=False)
        write_whole(output / "comparison.json", text + "\n")
    return made


def _groups(names: list[str]) -> list[Group]:
    """Return the settings in the order of their first folder."""
    parts = {name: _folders(name) for name in names}
    _require_distinct([folder for name in names for folder in parts[name] or [Path(name)]])
    alone: list[Run] = []
    groups: dict[str, Group] = {}
    for name, folders in parts.items():
        if not folders:
            raise ValueError(f"{name!r} names no folder: expected FOLDER or FOLDER,FOLDER")
        if len(folders) == 1 and _is_run(folders[0]):
            alone.append(_evaluated(folders[0]))
        else:
            groups[name] = _joined(name, folders)
    settings = group_runs(alone)
    of_run = {run.folder: g for g in settings for run in (*g.runs, *g.repeated)}
    labels = Counter(group.label for group in (*groups.values(), *settings))
    for name, group in groups.items():
        if labels[group.label] > 1:  # they differ in more than the objective
            groups[name] = replace(group, label=name)
    ordered = [groups[name] if name in groups else of_run[parts[name][0]] for name in names]
    return list({id(group): group for group in ordered}.values())


def _folders(name: str) -> list[Path]:
    """Return the folders that a name joins by commas; a folder's own name may hold some."""
    whole = Path(name)
    return [whole] if whole.is_dir() else [Path(part) for part in name.split(",") if part]


def _require_distinct(folders: list[Path]) -> None:
    seen: set[Path] = set()
    for folder in folders:
        if folder.resolve() in seen:
            raise ValueError(f"{folder} is named twice: one evaluation counts once")
        seen.add(folder.resolve())


def _is_run(folder: Path) -> bool:
    return (folder / "run.json").is_file()


def _evaluated(folder: Path) -> Run:
    run = load_run(folder)
    if run.evaluation is None and not run.tasks:
        raise ValueError(
            f"{folder} has not been evaluated: run `infoentropy evaluate` or `infoentropy tasks` "
            f"on its model with --output {folder}"
        )
    return run


def _joined(name: str, folders: list[Path]) -> Group:
    """Return the setting whose seeds are in `folders`.

    Raises:
        ValueError: runs of different objectives or set-ups, or two of one seed.
    """
    known = [_evaluated(folder) for folder in folders if _is_run(folder)]
    settings = group_runs(known)
    _require_one_setting(settings)
    if len(known) == len(folders):
        return Group(settings[0].label, is_baseline=False, runs=known, repeated=[])
    runs = []
    for place, folder in enumerate(folders, start=1):
        tasks, info = load_results(folder), {"name": str(folder), "seed": place}
        needed = not tasks or (folder / SUMMARY_FILE).is_file()
        runs.append(
            Run(folder, info, TrainingLog(), load_evaluation(folder) if needed else None, tasks)
        )
    return Group(name, is_baseline=False, runs=runs, repeated=[], seeds_known=False)


def _require_one_setting(groups: list[Group]) -> None:
    if len(groups) > 1:
        names = " and ".join(group.runs[0].name for group in groups[:2])
        labels = "; ".join(group.label for group in groups[:2])
        raise ValueError(
            f"{names} are not seeds of one setting: {labels}. Join only what differs in nothing "
            "but the seed"
        )
    for again in (run for group in groups for run in group.repeated):
        one = next(run.name for run in groups[0].runs if run.seed == again.seed)
        raise ValueError(
            f"{one} and {again.name} have the same seed {again.seed}: join one run of each seed"
        )
