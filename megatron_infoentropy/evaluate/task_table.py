"""Task results of all runs as one table: a row a task and metric, a cell a setting."""

import math
from typing import Any

from megatron_infoentropy.evaluate.runs import Run
from megatron_infoentropy.tasks.results import Metric, TaskResult


def task_table(groups: list[list[Run]]) -> list[dict[str, Any]]:
    """Rows in the order of the tasks' names; `groups` are the runs of every setting.

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
