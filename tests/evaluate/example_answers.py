"""Writes answers to tasks into run folders, drawn from a known truth."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from megatron_infoentropy.tasks.results import Items, Metric, TaskResult


def write_answers(
    folder: Path,
    seed: int,
    *,
    tasks: Sequence[str] = ("first", "second"),
    shift: float = 0.0,
    gain: float = 0.0,
    items: int = 60,
    version: str = "1.0",
    acc: float = 0.5,
) -> None:
    """FOLDER/tasks/NAME.json; `shift` moves the right answers' bits per byte, `gain` the accuracy.

    What makes an item hard is the same for every seed; a seed adds to every item and to each.
    """
    for place, name in enumerate(tasks):
        shared, own = np.random.default_rng(place), np.random.default_rng([seed, place])
        size = shared.integers(4, 30, items)
        per_byte = shared.gamma(4, 0.3, items) + own.normal(0, 0.01) + own.normal(0, 0.05, items)
        right = (shared.random(items) + own.normal(0, 0.1, items) < 0.4 + gain).astype(float)
        made = Items(
            [f"{name}-{number}" for number in range(items)],
            {name: items},
            ((per_byte + shift) * size).tolist(),
            size.tolist(),
            right.tolist(),
            pooled=False,
        )
        metrics = {"acc": Metric(acc, 0.02)}
        result = TaskResult(name, 0, None, items, "key", metrics, {}, {"task": version}, made)
        result.save(folder / "tasks" / f"{name}.json")
