"""What tasks said about a model: FOLDER/tasks/NAME.json, one file a question, each whole.

format, task, shots (null: the task's own), limit (null: all), samples
key       hash of all that the answer depends on; another key is another question
metrics   {name: {value, stderr or null}}
subtasks  {name: metrics} of a group
versions  of lm_eval, torch, transformers and of the task itself
items     one number an item, in the order asked, see `Items`

Beside it NAME.samples.jsonl.gz, a line an item: what lm-evaluation-harness logs (prompts, answers,
metrics), the bits per byte of every choice, and which of them is right.
"""

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_infoentropy.files import write_whole

FOLDER = "tasks"
FORMAT = 2


@dataclass(frozen=True)
class Metric:
    """A number about answers; `stderr` over questions, None where the task gives none."""

    value: float
    stderr: float | None


Metrics = dict[str, Metric]


@dataclass(frozen=True)
class Items:
    """The items of one question, in the order asked; None where an item has no such number.

    Attributes:
        ids: hash of an item's content, prompt and right answer: equal where runs can be paired.
        tasks: {task: its items}, in order; of a group several.
        bits: what the right answer costs, -log2 of its probability.
        bytes: of UTF-8 in that answer as it was scored, the space before it included.
        accuracy: 1 where the answer given is right, else 0.
        pooled: the mean is that of all bits over all bytes, as for running text; else that of the
            items' bits per byte.
    """

    ids: list[str]
    tasks: dict[str, int]
    bits: list[float | None]
    bytes: list[int]
    accuracy: list[float | None]
    pooled: bool

    def metrics(self) -> Metrics:
        """Return the mean bits per byte and its standard error; empty without any answer."""
        pairs = zip(self.bits, self.bytes, strict=True)
        values = [bits / size for bits, size in pairs if bits is not None]
        if self.pooled or not values:
            return {}
        mean = sum(values) / len(values)
        squares = sum((value - mean) ** 2 for value in values)
        error = math.sqrt(squares / (len(values) - 1) / len(values)) if len(values) > 1 else None
        return {"answer_bits_per_byte": Metric(mean, error)}


@dataclass(frozen=True)
class TaskResult:
    """What one question gave."""

    task: str
    shots: int | None
    limit: int | None
    samples: int
    key: str
    metrics: Metrics
    subtasks: dict[str, Metrics]
    versions: dict[str, str]
    items: Items

    def save(self, path: Path) -> None:
        """Write the file, whole or not at all."""
        write_whole(path, json.dumps({"format": FORMAT, **asdict(self)}, allow_nan=False) + "\n")


class TaskResultError(ValueError):
    """A result file that cannot be read."""


def load_result(path: Path) -> TaskResult:
    """Read one file.

    Raises:
        TaskResultError: it is damaged, or of another format.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content.pop("format") != FORMAT:
            raise ValueError(f"expected format {FORMAT}")
        content["metrics"] = _metrics(content["metrics"])
        subtasks = content["subtasks"].items()
        content["subtasks"] = {name: _metrics(metrics) for name, metrics in subtasks}
        content["items"] = Items(**content["items"])
        return TaskResult(**content)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise TaskResultError(
            f"{path} is no readable task result ({error}); remove it and run `infoentropy tasks` "
            "again"
        ) from error


def load_results(run: Path) -> dict[str, TaskResult]:
    """Return {question: result} of all that a run was asked; empty where nothing was.

    Raises:
        TaskResultError: a file cannot be read.
    """
    return {path.stem: load_result(path) for path in sorted((run / FOLDER).glob("*.json"))}


def _metrics(content: dict[str, dict[str, Any]]) -> Metrics:
    return {name: Metric(**numbers) for name, numbers in content.items()}
