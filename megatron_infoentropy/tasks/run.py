"""Asks a model what it has not answered yet; what fails is named at the end, the rest is kept."""

from pathlib import Path
from typing import TYPE_CHECKING

from megatron_infoentropy.progress import progress
from megatron_infoentropy.tasks.results import (
    FOLDER,
    TaskResult,
    TaskResultError,
    load_result,
)
from megatron_infoentropy.tasks.suites import Question, questions_of

if TYPE_CHECKING:
    from megatron_infoentropy.tasks.harness import Harness


class TasksFailed(RuntimeError):
    """Some tasks could not be asked; the results of the others are kept."""


def run_tasks(
    model: Path,
    output: Path,
    *,
    suites: tuple[str, ...] = (),
    tasks: tuple[str, ...] = (),
    shots: int | None = None,
    task_folder: Path | None = None,
    limit: int | None = None,
    device: str = "auto",
    batch_size: int = 8,
) -> dict[str, TaskResult]:
    """Put tasks to a Hugging Face model; answers that are there already stay.

    Args:
        model: folder with config.json, weights and tokenizer; nothing of it is fetched or executed.
        output: results go to `output/tasks/NAME.json`, where the report looks for them.
        suites: names of `suites.SUITES`.
        tasks: names of tasks or groups of lm_eval, or of the task folder.
        shots: examples in the prompts of `tasks`; None is each task's own number.
        task_folder: task descriptions of one's own, which go before lm_eval's; data files that they
            name are relative to it.
        limit: ask only so many questions of each task: to try it out, not to report.
        device: "auto" for a GPU where there is one, else the CPU.

    Returns:
        {question: result} of all that was asked, now or before.

    Raises:
        ValueError: an unknown suite or task, or no model; before anything is asked.
        TasksFailed: with every task that failed, and why.
    """
    questions = questions_of(suites, tasks, shots)
    if not (model / "config.json").is_file():
        raise ValueError(f"{model} is no Hugging Face model folder: it has no config.json")
    if task_folder is not None and not task_folder.is_dir():
        raise ValueError(f"there is no task folder {task_folder}")
    from megatron_infoentropy.tasks.harness import Harness, TaskDataError

    harness = Harness(
        model,
        task_folder,
        questions,
        device=_device(device),
        batch_size=batch_size,
        limit=limit,
    )
    results: dict[str, TaskResult] = {}
    failed = []
    with progress("tasks", len(questions), "tasks") as advance:
        for question in questions:
            path = output / FOLDER / f"{question.name}.json"
            kept = _kept(path, harness.key(question))
            try:
                results[question.name] = kept or _ask(harness, question, path)
            except TaskDataError as error:
                failed.append(str(error))
            advance(1)
    if failed:
        raise TasksFailed(f"{len(failed)} of {len(questions)} tasks failed: " + "\n".join(failed))
    return results


def _kept(path: Path, key: str) -> TaskResult | None:
    """The answer that is there, if it is one to this question."""
    try:
        result = load_result(path)
    except TaskResultError:
        return None
    return result if result.key == key else None


def _ask(harness: "Harness", question: Question, path: Path) -> TaskResult:
    result = harness.ask(question)
    result.save(path)
    return result


def _device(name: str) -> str:
    if name != "auto":
        return name
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"
