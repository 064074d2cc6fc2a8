"""Tasks compared: the answers of one setting's runs against those of another's, item by item.

The inference is that of documents (`inference`), with items in the documents' place:

    task      a task's bits per byte of the right answers, over its items; of a group of at least
              `FEWEST_DOCUMENTS` tasks, such as mmlu, over its tasks, whose items are alike
    accuracy  the share of items that are answered right, in the same way
    tasks     the mean of all questions' bits per byte, each counting the same, over the questions:
              what other tasks would change

Runs are paired by seed, and items with themselves: only questions that all runs answered are
compared, with the same items, prompts and version of the task.
"""

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from megatron_infoentropy.evaluate.comparison import (
    NO_BASELINE,
    Comparison,
    Kind,
    Rows,
    corrected,
    described,
    differences,
    without_baseline,
)
from megatron_infoentropy.evaluate.groups import Group, Match, match, one_model_twice
from megatron_infoentropy.evaluate.inference import FEWEST_DOCUMENTS, Sums
from megatron_infoentropy.evaluate.runs import Run
from megatron_infoentropy.tasks.results import Items

ALL_TASKS = "mean over tasks"
_KINDS: tuple[Kind, ...] = ("task", "accuracy")
_NOT_ASKED = "no run of it has been asked a task"

Floats = NDArray[np.float64]


def compare_tasks(pairs: list[tuple[Group, Group | None]]) -> list[Comparison]:
    """Compare the answers of each group with its baseline's; one correction over all of them."""
    return corrected([_compare(group, baseline) for group, baseline in pairs])


def _compare(group: Group, baseline: Group | None) -> tuple[Comparison, Rows]:
    """Return a comparison without its rows, and these, whose p-values are not adjusted yet."""
    group = replace(group, counted="asked")
    if baseline is None or not group.compared:
        return without_baseline(group, NO_BASELINE if group.compared else _NOT_ASKED), []
    baseline = replace(baseline, counted="asked")
    matched = match(group, baseline)
    made = described(group, baseline, matched)
    if not matched.ours:
        reason = "no seed was trained and asked tasks with both objectives"
        return replace(made, refusal=reason if baseline.compared else _NOT_ASKED), []
    runs = [*matched.ours, *matched.theirs]
    names = dict.fromkeys(name for run in runs for name in run.tasks)
    reasons = {name: _why_not(name, runs) for name in names}
    made.left_out.extend(f"task {name}, as {reason}" for name, reason in reasons.items() if reason)
    questions = [name for name in names if not reasons[name]]
    if not questions:
        return replace(made, refusal="; ".join(made.left_out), left_out=[]), []

    def is_same(one: Run, other: Run) -> bool:
        return all(one.tasks[name].items == other.tasks[name].items for name in questions)

    for side in (matched.ours, matched.theirs):
        if refusal := one_model_twice(side, is_same, "asked"):
            return replace(made, refusal=refusal), []
    rows = _rows({name: [run.tasks[name].items for run in runs] for name in questions}, matched)
    rows.sort(key=lambda row: ("tasks", *_KINDS).index(row[0].kind))
    return replace(made, identical=matched.identical(is_same)), rows


def _why_not(name: str, runs: Sequence[Run]) -> str | None:
    """Return why a question cannot be compared over these runs, if so."""
    for run in runs:
        if name not in run.tasks:
            return f"{run.name} has not been asked it"
    for one, other in pairwise(runs):
        versions = [run.tasks[name].versions.get("task") for run in (one, other)]
        if versions[0] != versions[1]:
            return (
                f"{one.name} and {other.name} were asked versions {versions[0]} and {versions[1]} "
                "of it: ask both again with one lm-eval"
            )
    first = runs[0].tasks[name].items
    for run in runs[1:]:
        items = run.tasks[name].items
        if items.ids != first.ids:
            shared = len(set(items.ids) & set(first.ids))
            return (
                f"{runs[0].name} and {run.name} were not asked the same items ({len(first.ids)} "
                f"and {len(items.ids)}, {shared} of them shared, prompts included): ask both with "
                "the same --limit and the same task description"
            )
    return None


def _rows(questions: dict[str, list[Items]], matched: Match) -> Rows:
    """Return the differences of all questions and of the mean over them, and their estimates."""
    rows: Rows = []
    means = []
    for name, items in questions.items():
        sums = question_sums(items)
        rows += differences([(kind, name) for kind in _KINDS], sums, matched)
        means.append(sums.nats()[:, 0])
    known = np.array([mean for mean in means if np.isfinite(mean).all()])  # [questions, runs]
    if len(known) > 1:
        every = Sums(np.ones((len(known), 1)), known.T[:, :, None])
        rows += differences([("tasks", ALL_TASKS)], every, matched)
    return rows


def question_sums(items: list[Items]) -> Sums:
    """Return the sums of one question's units: its items, or its tasks where those are many.

    items: of every run, the same ones.

    Returns:
        Two statistics: bits over bytes of running text, else the items' mean bits per byte; and
        the accuracy.
    """
    first = items[0]
    size = np.array(first.bytes, dtype=np.float64)
    bits = _numbers([one.bits for one in items])
    weight = size if first.pooled else np.ones_like(size)
    has_bits = ~np.isnan(bits[0])
    with np.errstate(invalid="ignore", divide="ignore"):
        cost = np.where(has_bits, bits if first.pooled else bits / size, 0)
    right = _numbers([one.accuracy for one in items])
    has_accuracy = ~np.isnan(right[0])
    counts = np.stack([weight * has_bits, has_accuracy], axis=-1).astype(np.float64)
    sums = np.stack([cost, np.where(has_accuracy, right, 0)], axis=-1)
    tasks = list(first.tasks.values())
    if len(tasks) < FEWEST_DOCUMENTS:
        return Sums(counts, sums)
    starts = np.cumsum(tasks) - tasks
    return Sums(np.add.reduceat(counts, starts), np.add.reduceat(sums, starts, axis=1))


def _numbers(values: list[list[float | None]]) -> Floats:
    """Return numbers [runs, items], NaN for None."""
    return np.array([[np.nan if v is None else v for v in row] for row in values], dtype=np.float64)
