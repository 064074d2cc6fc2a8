"""Everything that the report's page shows, as one plain structure: what report.json holds.

Scores of a setting are means over its seeds; task results are a row a task and metric, a cell a
setting. The weights of tokens, over entropy and token by token in a passage, are those of the code
that trains, `loss.weighting`.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from string import ascii_uppercase
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_infoentropy import __version__
from megatron_infoentropy.config import InfoEntropyConfig
from megatron_infoentropy.evaluate import verdict
from megatron_infoentropy.evaluate.comparison import Comparison, compare_pairs, with_baselines
from megatron_infoentropy.evaluate.evaluation import Evaluation
from megatron_infoentropy.evaluate.figure import SERIES
from megatron_infoentropy.evaluate.groups import Group, group_runs
from megatron_infoentropy.evaluate.runlog import Values
from megatron_infoentropy.evaluate.runs import Run
from megatron_infoentropy.evaluate.tally import perplexity
from megatron_infoentropy.evaluate.task_comparison import compare_tasks
from megatron_infoentropy.tasks.results import Metric, TaskResult

FORMAT = 5
AVERAGES = ("weighted_average", "uniform_average", "worst_case")
_MOST_PASSAGES = 3
LEVELS = 6  # of colour
_POINTS = 121
_LEAST_SPAN = 0.25  # of the mean weight, that the colours span: smaller differences stay pale


def report_data(runs: list[Run], notes: Sequence[str] = ()) -> dict[str, Any]:
    """Return everything the page shows, as JSON; numbers that are not finite become None."""
    groups = group_runs(runs)
    pairs = with_baselines(groups)
    comparisons = compare_pairs(pairs)
    task_comparisons = compare_tasks(pairs) if any(run.tasks for run in runs) else []
    of_all = [*comparisons, *task_comparisons]
    first_color = 0 if groups[0].is_baseline else 1  # the first is cross entropy's, always
    position = {id(run): index for index, run in enumerate(runs)}
    group_of = {
        id(run): index
        for index, group in enumerate(groups)
        for run in (*group.runs, *group.repeated)
    }
    weighted = weighted_settings(groups)
    reasons = {one.label: why_not_drawn(one.loss) for one in weighted}
    drawn = [one for one in weighted if not reasons[one.label]]
    data = {
        "format": FORMAT,
        "version": __version__,
        "verdict": {
            "answers": verdict.answers(of_all),
            "limits": [
                *notes,
                *verdict.limits(runs, groups, of_all),
                *(f"The weights of {n} are not drawn, {why}." for n, why in reasons.items() if why),
            ],
        },
        "groups": [
            _describe_group(group, place, place + first_color, position)
            for place, group in enumerate(groups)
        ],
        "runs": [_describe_run(run, group_of[id(run)]) for run in runs],
        "comparisons": _described(comparisons),
        "task_comparisons": _described(task_comparisons),
        "weights": weight_curves(drawn),
        "passages": [one for one in map(weigh_passage, drawn) if one][:_MOST_PASSAGES],
        "tasks": task_table([group.runs for group in groups]),
    }
    finite: dict[str, Any] = json.loads(json.dumps(data), parse_constant=lambda _: None)
    return finite


def _described(comparisons: list[Comparison]) -> list[dict[str, Any]]:
    return [asdict(made) | {"matched": verdict.how_matched(made)} for made in comparisons]


def _describe_group(
    group: Group, place: int, color: int, position: dict[int, int]
) -> dict[str, Any]:
    """Describe a group by its runs' places; `color` counts the figures' series from 1."""
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
    }


def _describe_run(run: Run, group: int) -> dict[str, Any]:
    return {
        "name": run.name,
        "group": group,
        "objective_label": run.objective_label,
        "info": run.info | {"command": _portable(run)},
        "last_iteration": run.log.last_iteration,
        "tokens_seen": run.tokens_seen,
        "training": _series(run.log.training),
        "validation": _series(run.log.validation),
        "observed": _series(run.log.observed),
        "evaluation": run.evaluation.summary if run.evaluation else None,
    }


def _portable(run: Run) -> list[str]:
    """Return the command with paths as seen from here, or from beside the run."""
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
    """Return every number of a log as iterations and values, without those not finite."""
    result: dict[str, dict[str, list[float]]] = {}
    for iteration, values in sorted(logged.items()):
        for name, value in values.items():
            if math.isfinite(value):
                series = result.setdefault(name, {"iterations": [], "values": []})
                series["iterations"].append(float(iteration))
                series["values"].append(value)
    return result


def mean_scores(evaluations: list[Evaluation]) -> dict[str, Any]:
    """Return means over evaluations of a setting: {"domains": {name: scores}, average: scores}.

    Scores are nats_per_token, perplexity (of the mean nats) and bits_per_byte, None where unknown.
    """
    if not evaluations:
        return {"domains": {}, **dict.fromkeys(AVERAGES)}
    summaries = [evaluation.summary for evaluation in evaluations]
    domains = {name: None for summary in summaries for name in summary["domains"]}
    return {
        "domains": {
            name: _mean([s["domains"][name] for s in summaries if name in s["domains"]])
            for name in domains
        },
        **{name: _mean([s[name] for s in summaries if name in s]) for name in AVERAGES},
    }


def _mean(scores: list[dict[str, Any]]) -> dict[str, Any] | None:
    nats = [score["nats_per_token"] for score in scores if score["nats_per_token"] is not None]
    if not nats:
        return None
    mean = sum(nats) / len(nats)
    bits = [score.get("bits_per_byte") for score in scores]
    known = [one for one in bits if one is not None]
    return {
        "nats_per_token": mean,
        "perplexity": perplexity(mean),
        "bits_per_byte": sum(known) / len(known) if known and len(known) == len(bits) else None,
        "documents": scores[0].get("documents"),
        "tokens": scores[0].get("tokens"),
        "domain": scores[0].get("domain"),
    }


def task_table(groups: list[list[Run]]) -> list[dict[str, Any]]:
    """Return rows in the order of the tasks' names; `groups` are the runs of every setting.

    Returns:
        task, metric, samples, limit, and cells, one a group: None, or the mean over runs, the
        standard error over questions of one run (root mean square), the smallest and the largest
        run, and how many there are.
    """
    results = [[run.tasks for run in runs] for runs in groups]
    first: dict[tuple[str, str], TaskResult] = {}
    for run in (run for runs in results for run in runs):
        for name, result in run.items():
            for metric in result.metrics:
                first.setdefault((name, metric), result)
    return [
        {
            "task": name,
            "metric": metric,
            "samples": result.samples,
            "limit": result.limit,
            "cells": [_cell([run[name].metrics.get(metric) for run in runs if name in run])
                      for runs in results],
        }
        for (name, metric), result in sorted(first.items(), key=lambda item: item[0])
    ]  # fmt: skip


def _cell(metrics: list[Metric | None]) -> dict[str, Any] | None:
    known = [metric for metric in metrics if metric is not None]
    if not known:
        return None
    values = [metric.value for metric in known]
    errors = [metric.stderr for metric in known if metric.stderr is not None]
    mean_square = sum(error**2 for error in errors) / len(errors) if errors else None
    return {
        "mean": sum(values) / len(values),
        "stderr": None if mean_square is None else math.sqrt(mean_square),
        "low": min(values),
        "high": max(values),
        "runs": len(values),
    }


@dataclass(frozen=True)
class Weighted:
    """A setting that weights tokens: its place, its first evaluated run, that run's last loss."""

    group: int
    label: str
    run: Run
    loss: InfoEntropyConfig


def weighted_settings(groups: list[Group]) -> list[Weighted]:
    first = [(group.evaluated or group.runs)[0] for group in groups]
    every = [
        Weighted(place, group.label, run, final_loss(run))
        for place, (group, run) in enumerate(zip(groups, first, strict=True))
    ]
    return [one for one in every if one.loss.is_weighted]


def weight_curves(drawn: list[Weighted]) -> dict[str, Any] | None:
    """Return weights over entropy H at the end of trainings, of mean 1 over the scored tokens.

    The tokens are those of the first evaluated InfoEntropy run, or of the first evaluated run
    where there is none; without any evaluation there is nothing to scale by and None is returned.
    Where weights depend on cross entropy too, it is the mean one of the tokens of entropy H.

    Returns:
        run: the name of that run; entropy: H in nats; curves: a setting's place and its weights at
        H; histogram: as the evaluation holds it.
    """
    evaluated = [one for one in drawn if one.run.evaluation is not None]
    if not evaluated:
        return None
    source = min(evaluated, key=lambda one: one.loss.objective != "infoentropy").run
    assert source.evaluation is not None
    histogram = source.evaluation.summary["entropy_histogram"]
    entropy = np.linspace(0.0, histogram["edges"][-1], _POINTS)
    return {
        "run": source.name,
        "entropy": entropy.tolist(),
        "curves": [
            {"group": one.group, "weight": _relative_weights(one.loss, entropy, histogram)}
            for one in drawn
        ],
        "histogram": histogram,
    }


def weigh_passage(weighted: Weighted) -> dict[str, Any] | None:
    """Return the passage of a run's evaluation with every token's weight, of mean 1.

    Returns:
        label, run, domain, document, and tokens, each with text, weight, entropy, ce and a level of
        colour from 0 to 5; None without an evaluation.
    """
    run = weighted.run
    if run.evaluation is None:
        return None
    passage = run.evaluation.summary["passage"]
    weight = weigh(weighted.loss, passage["ce"], passage["entropy"])
    weight /= weight.mean() or 1.0
    span = max(float(np.ptp(weight)), _LEAST_SPAN)
    level = np.minimum(LEVELS * (weight - weight.min()) / span, LEVELS - 1).astype(int)
    columns = {
        "text": passage["text"],
        "weight": weight.tolist(),
        "entropy": passage["entropy"],
        "ce": passage["ce"],
        "level": level.tolist(),
    }
    tokens = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    place = {name: passage[name] for name in ("domain", "document")}
    return {"label": weighted.label, "run": run.name, **place, "tokens": tokens}


def final_loss(run: Run) -> InfoEntropyConfig:
    """Return the loss of a run's last step: a schedule of gamma has come so far."""
    steps = run.log.last_iteration or int(run.info["train_iters"])
    return run.loss.at(steps * int(run.info["global_batch_size"])).effective()


def why_not_drawn(loss: InfoEntropyConfig) -> str:
    """Return why an evaluation, with its cross entropies and entropies, gives no weights, or ""."""
    if loss.needs_sum_p_squared:
        return "as they depend on the sum of squared probabilities, which no evaluation keeps"
    if loss.objective == "custom":
        return "as that takes its code, and a run folder alone makes no code run"
    return "as they depend on the other tokens of a micro-batch" if loss.compares_tokens else ""


def weigh(loss: InfoEntropyConfig, ce: Any, entropy: Any) -> NDArray[np.float64]:
    """Return the weights that a training gives to such tokens, before normalisation."""
    import torch

    from megatron_infoentropy.loss.statistics import TokenStatistics
    from megatron_infoentropy.loss.token_batch import token_batch
    from megatron_infoentropy.loss.weighting import token_weight

    known = [torch.tensor(np.maximum(each, 0.0), dtype=torch.float64) for each in (ce, entropy)]
    unknown = torch.full_like(known[0], torch.nan)
    is_top = torch.zeros_like(unknown, dtype=torch.bool)
    tokens = token_batch(TokenStatistics(known[0], known[1], unknown, is_top))
    with torch.no_grad():
        weight = token_weight(tokens, replace(loss, detach_weight=True))
    return np.asarray(weight.numpy(), dtype=np.float64)


def _relative_weights(
    loss: InfoEntropyConfig, entropy: NDArray[np.float64], histogram: dict[str, Any]
) -> list[float]:
    """Return the weights of tokens of these entropies over the mean weight of the histogram."""
    filled = [i for i, tokens in enumerate(histogram["tokens"]) if tokens]
    tokens, occurring, mean_ce = (
        np.array([histogram[name][i] for i in filled], dtype=float)
        for name in ("tokens", "mean_entropy", "mean_ce")
    )
    mean = np.average(weigh(loss, mean_ce, occurring), weights=tokens)
    weight = weigh(loss, np.interp(entropy, occurring, mean_ce), entropy)
    curve: list[float] = (weight / (mean or 1.0)).tolist()
    return curve
