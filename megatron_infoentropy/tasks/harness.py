"""lm-evaluation-harness through its Python API: tasks by name, a local model, numbers back."""

import contextlib
import difflib
import gzip
import hashlib
import json
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lm_eval import simple_evaluate  # type: ignore[import-untyped]
from lm_eval.api.instance import Instance  # type: ignore[import-untyped]
from lm_eval.models.huggingface import HFLM  # type: ignore[import-untyped]
from lm_eval.tasks import TaskManager  # type: ignore[import-untyped]
from lm_eval.utils import handle_non_serializable  # type: ignore[import-untyped]

from megatron_infoentropy.files import file_sha256, write_atomically
from megatron_infoentropy.tasks.ask import Question
from megatron_infoentropy.tasks.results import FORMAT, Items, Metric, Metrics, TaskResult

_BOOTSTRAP = 1000  # draws for the standard errors of what is no mean
_ACCURACY = ("acc", "exact_match")  # the first that a task has
_HASH = 16  # hexadecimal digits: 64 bits

Sample = dict[str, Any]  # as lm_eval logs it


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
        load: Callable[[Path, torch.dtype], Any],
        folder: Path | None,
        questions: list[Question],
        *,
        device: str,
        batch_size: int,
        limit: int | None,
    ) -> None:
        self._model, self._folder = model.resolve(), folder.resolve() if folder else None
        self._load_network = load
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        self._device, self._batch_size, self._limit = device, batch_size, limit
        self._tasks = _find(self._folder, {question.task for question in questions})
        self._network: HFLM | None = None  # loaded when there is something to ask
        self._hashes = [_hash_of(self._model), _hash_of(self._folder) if self._folder else ""]

    def key(self, question: Question) -> str:
        """Return the hash of the model's weights, local tasks, question and harness."""
        parts = [*self._hashes, question.name, str(self._limit), version("lm_eval"), str(FORMAT)]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    def ask(self, question: Question, samples_file: Path) -> TaskResult:
        """Put one task to the model, and write down what it answered, item by item.

        Raises:
            TaskDataError: its data cannot be read or fetched, or do not fit its description.
        """
        samples_file = samples_file.resolve()
        with contextlib.chdir(self._folder or "."):  # data files of local tasks lie beside them
            task, leaves = self._load(question)
            results: Any = simple_evaluate(
                model=self._load_model(),
                tasks=[task],
                num_fewshot=question.shots,
                limit=self._limit,
                task_manager=self._tasks,
                bootstrap_iters=_BOOTSTRAP,
                log_samples=True,
            )
            samples = {
                name: self._scored(leaves[name], of_task)
                for name, of_task in results["samples"].items()
            }
        _write_samples(samples, samples_file)
        items = _items(samples)
        numbers = results["results"] | results.get("groups", {})
        metrics = {name: _metrics(values) for name, values in numbers.items()}
        for name, of_task in samples.items():
            metrics[name] |= _items({name: of_task}).metrics()
        versions = {name: version(name) for name in ("lm_eval", "torch", "transformers")}
        task_version = results["versions"].get(question.task)
        return TaskResult(
            question.task,
            question.shots,
            self._limit,
            sum(n["effective"] for n in results["n-samples"].values()),
            self.key(question),
            metrics.pop(question.task) | items.metrics(),
            metrics,
            versions | ({} if task_version is None else {"task": str(task_version)}),
            items,
        )

    def _load(self, question: Question) -> tuple[Any, dict[str, Any]]:
        """Return lm_eval's task or group of tasks, and every single task in it by name."""
        try:
            loaded = self._tasks.load(question.task)
        # Whatever a loader of data, a hub client or a task's own code may raise.
        except Exception as error:
            raise TaskDataError(
                f"the data of task {question.task!r} cannot be had: {_first_line(error)}. Without "
                "a network, fetch them once on a machine that has one and copy its HF_HOME, or "
                "describe a task on local files and name its --task-folder"
            ) from error
        tasks = loaded["tasks"]
        return loaded["groups"].get(question.task) or tasks[question.task], tasks

    def _scored(self, task: Any, samples: list[Sample]) -> list[Sample]:
        """Return samples of the task's first filter, with bits and bytes of each choice added.

        Where the model writes its answer, the first right answer is the one choice, scored here.
        """
        samples = [sample for sample in samples if sample["filter"] == samples[0]["filter"]]
        choices = [_choices(task, sample) for sample in samples]
        unscored = [place for place, each in enumerate(choices) if None in each.log_likelihoods]
        requests = [
            Instance("loglikelihood", {}, (samples[i]["arguments"][0][0], choices[i].texts[0]), 0)
            for i in unscored
        ]
        answers = self._load_model().loglikelihood(requests, disable_tqdm=True) if requests else []
        for place, (log_likelihood, _) in zip(unscored, answers, strict=True):
            choices[place].log_likelihoods[0] = log_likelihood
        for sample, each in zip(samples, choices, strict=True):
            sample["choice_bits"] = [-value / math.log(2) for value in each.log_likelihoods]
            sample["choice_bytes"] = [len(text.encode()) for text in each.texts]
            sample["right_choice"] = each.right
            sample["is_running_text"] = task.OUTPUT_TYPE == "loglikelihood_rolling"
            if not all(map(math.isfinite, sample["choice_bits"])):
                raise TaskDataError(
                    f"the model gives item {sample['doc_id']} of task {task.task_name!r} no finite "
                    "probability: check the checkpoint and its export"
                )
        return samples

    def _load_model(self) -> HFLM:
        if self._network is None:
            logging.getLogger("lm_eval").setLevel(logging.ERROR)
            self._network = HFLM(
                pretrained=self._load_network(self._model, torch.float32).to(self._device),
                tokenizer=str(self._model),
                backend="causal",
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


@dataclass(frozen=True)
class _Choices:
    """Answers to one item, as they follow its prompt, the space before them included.

    `right` is the place of the right one, None where the task tells none; a log-likelihood is None
    while the model has not been asked for it.
    """

    texts: list[str]
    log_likelihoods: list[Any]
    right: int | None


def _choices(task: Any, sample: Sample) -> _Choices:
    arguments = sample["arguments"]
    if task.OUTPUT_TYPE == "generate_until":
        answer = _first(task.doc_to_target(sample["doc"]))
        if answer is None or not str(answer).strip():
            return _Choices([], [], None)
        delimiter = "" if arguments[0][0][-1:].isspace() else task.config.target_delimiter
        return _Choices([f"{delimiter}{answer}"], [None], 0)
    texts = [words[1] if len(words) > 1 else words[0] for words in arguments]
    log_likelihoods = [r[0] if isinstance(r, tuple) else r for r in sample["filtered_resps"]]
    right: int | None = 0 if len(texts) == 1 else None
    if task.OUTPUT_TYPE == "multiple_choice":
        names = task.doc_to_choice(sample["doc"])
        right = _right_choice(task, sample["doc"], names)
        texts = texts[: len(names)]  # some metrics ask for them again, without the prompt
    return _Choices(texts, log_likelihoods[: len(texts)], right)


def _right_choice(task: Any, doc: Any, names: list[str]) -> int | None:
    """Return the place of the (first) right choice, None where the task names none of them."""
    right = _first(task.doc_to_text(doc) if task.multiple_input else task.doc_to_target(doc))
    if isinstance(right, str):
        return names.index(right) if right in names else None
    return right if isinstance(right, int) and 0 <= right < len(names) else None


def _first(value: Any) -> Any:
    return next(iter(value), None) if isinstance(value, list | tuple) else value


def _items(samples: dict[str, list[Sample]]) -> Items:
    """Return one number an item of all tasks' samples."""
    every = [(name, sample) for name, of_task in samples.items() for sample in of_task]
    bits: list[float | None] = []
    sizes: list[int] = []
    for _, sample in every:
        place = sample["right_choice"]
        bits.append(None if place is None else round(sample["choice_bits"][place], 6))
        sizes.append(0 if place is None else sample["choice_bytes"][place])
    return Items(
        [_id(name, sample) for name, sample in every],
        {name: len(of_task) for name, of_task in samples.items()},
        bits,
        sizes,
        [_accuracy(sample) for _, sample in every],
        all(sample["is_running_text"] for _, sample in every),
    )


def _id(task: str, sample: Sample) -> str:
    words = [sample[name] for name in ("doc_id", "doc_hash", "prompt_hash", "target_hash")]
    return hashlib.sha256("\n".join(map(str, [task, *words])).encode()).hexdigest()[:_HASH]


def _accuracy(sample: Sample) -> float | None:
    for name in _ACCURACY:
        if isinstance(value := sample.get(name), int | float | np.generic):
            return float(value)
    return None


def _write_samples(samples: dict[str, list[Sample]], path: Path) -> None:
    with write_atomically(path) as temporary, gzip.open(temporary, "wt", encoding="utf-8") as file:
        for name, of_task in samples.items():
            for sample in of_task:
                line = json.dumps({"task": name} | sample, default=handle_non_serializable)
                file.write(line + "\n")


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
