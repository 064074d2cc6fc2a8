"""What tasks said about a model: FOLDER/tasks/NAME.json, one file a question, each whole.

format, task, shots (null: the task's own), limit (null: all), samples
key       hash of all that the answer depends on; another key is another question
metrics   {name: {value, stderr or null}}
subtasks  {name: metrics} of a group
versions  of lm_eval, torch, transformers and of the task itself
"""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from megatron_infoentropy.files import write_whole

FOLDER = "tasks"
FORMAT = 1


@dataclass(frozen=True)
class Metric:
    """A number about answers; `stderr` over questions, None where the task gives none."""

    value: float
    stderr: float | None


Metrics = dict[str, Metric]


@dataclass(frozen=True)
class TaskResult:
    """What one question gave."""

    task: str
    shots: int | None
    limit: int | None
    samples: int
    key: str
    metrics: Metrics
    subtasks: dict[str, Metrics] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)

    def save(self, path: Path) -> None:
        """Write the file, whole or not at all."""
        write_whole(path, json.dumps({"format": FORMAT, **asdict(self)}, indent=1) + "\n")


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
