"""lm-evaluation-harness through its Python API: tasks by name, a local model, numbers back."""

import contextlib
import difflib
import hashlib
import logging
import math
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from lm_eval import simple_evaluate  # type: ignore[import-untyped]
from lm_eval.models.huggingface import HFLM  # type: ignore[import-untyped]
from lm_eval.tasks import TaskManager  # type: ignore[import-untyped]

from megatron_infoentropy.files import file_sha256
from megatron_infoentropy.tasks.ask import Question
from megatron_infoentropy.tasks.results import Metric, Metrics, TaskResult

_BOOTSTRAP = 1000  # draws for the standard errors of what is no mean


class TaskDataError(ValueError):
    """A task's data cannot be read or fetched."""


class Harness:
    """Tasks of lm_eval, and before them those of a folder, put to one model.

    Raises:
        ValueError: there is no such task; before a model is loaded, with names that are like it.
    """

    def __init__(
        self,
        model: Path,
        folder: Path | None,
        questions: list[Question],
        *,
        device: str,
        batch_size: int,
        limit: int | None,
    ) -> None:
        self._model, self._folder = model.resolve(), folder.resolve() if folder else None
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        self._device, self._batch_size, self._limit = device, batch_size, limit
        self._tasks = _find(self._folder, {question.task for question in questions})
        self._network: HFLM | None = None  # loaded when there is something to ask
        self._hashes = [_hash_of(self._model), _hash_of(self._folder) if self._folder else ""]

    def key(self, question: Question) -> str:
        """Return the hash of the model's weights, local tasks, question and harness."""
        parts = [*self._hashes, question.name, str(self._limit), version("lm_eval")]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    def ask(self, question: Question) -> TaskResult:
        """Put one task to the model.

        Raises:
            TaskDataError: its data cannot be read or fetched, or do not fit its description.
        """
        with contextlib.chdir(self._folder or "."):  # data files of local tasks lie beside them
            task = self._load(question)
            results: Any = simple_evaluate(
                model=self._load_model(),
                tasks=[task],
                num_fewshot=question.shots,
                limit=self._limit,
                task_manager=self._tasks,
                bootstrap_iters=_BOOTSTRAP,
                log_samples=False,
            )
        numbers = results["results"] | results.get("groups", {})
        samples = sum(n["effective"] for n in results["n-samples"].values())
        versions = {name: version(name) for name in ("lm_eval", "torch", "transformers")}
        task_version = results["versions"].get(question.task)
        return TaskResult(
            question.task,
            question.shots,
            self._limit,
            samples,
            self.key(question),
            _metrics(numbers[question.task]),
            {name: _metrics(n) for name, n in numbers.items() if name != question.task},
            versions | ({} if task_version is None else {"task": str(task_version)}),
        )

    def _load(self, question: Question) -> Any:
        try:
            loaded = self._tasks.load(question.task)
        # Whatever a loader of data, a hub client or a task's own code may raise.
        except Exception as error:
            raise TaskDataError(
                f"the data of task {question.task!r} cannot be had: {_first_line(error)}. Without "
                "a network, fetch them once on a machine that has one and copy its HF_HOME, or "
                "describe a task on local files and name its --task-folder"
            ) from error
        return loaded["groups"].get(question.task) or loaded["tasks"][question.task]

    def _load_model(self) -> HFLM:
        if self._network is None:
            logging.getLogger("lm_eval").setLevel(logging.ERROR)
            self._network = HFLM(
                pretrained=str(self._model),
                backend="causal",
                dtype="float32",
                device=self._device,
                batch_size=self._batch_size,
                trust_remote_code=False,
            )
        return self._network


def _find(folder: Path | None, names: set[str]) -> TaskManager:
    """Return the folder's tasks if it has all the names: to read lm_eval's own takes seconds."""
    if folder is not None:
        own = TaskManager(include_path=str(folder), include_defaults=False)
        if names <= set(own.all_tasks):
            return own
    every = TaskManager(include_path=None if folder is None else str(folder))
    for name in sorted(names - set(every.all_tasks)):
        like = difflib.get_close_matches(name, every.all_tasks)
        raise ValueError(
            f"lm_eval {version('lm_eval')} has no task {name!r}"
            + (f"; do you mean {' or '.join(like)}?" if like else "")
        )
    return every


def _metrics(numbers: dict[str, Any]) -> Metrics:
    """Return lm_eval's {"acc,none": 0.5, "acc_stderr,none": 0.02, "alias": ...} by metric."""
    metrics = {}
    for key, value in numbers.items():
        name, comma, chosen = key.partition(",")
        if not comma or name.endswith("_stderr") or not isinstance(value, int | float):
            continue
        error = numbers.get(f"{name}_stderr,{chosen}")  # "N/A" where there is none
        stderr = float(error) if isinstance(error, int | float) else math.nan
        label = name if chosen == "none" else f"{name} ({chosen})"
        metrics[label] = Metric(float(value), stderr if math.isfinite(stderr) else None)
    return metrics


def _hash_of(folder: Path) -> str:
    """Return the hash of the contents of all files, by their names."""
    total = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.is_file() and "__pycache__" not in path.parts:
            total.update(f"{path.relative_to(folder)} {file_sha256(path)}\n".encode())
    return total.hexdigest()


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else 'without a word'}"
