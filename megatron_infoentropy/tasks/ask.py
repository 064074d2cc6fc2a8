"""Asks a model named suites of tasks: what it has not answered yet, task by task.

What fails is named at the end, the rest is kept. The suites are the paper's families of tasks, by
the names that lm_eval 0.4.13 ships. The paper names three: common-sense reasoning, closed-book
question answering, MMLU. Which tasks enter its averages is not published; these are the ones that
its code's copy of the harness was edited for, and the usual ones of each family. Prompts of 0.4
differ from those of that copy, so numbers here compare models with each other, not with the paper's
tables. storycloze_2016 is left out: its data are licensed one by one.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_infoentropy.progress import progress
from megatron_infoentropy.tasks.results import FOLDER, TaskResult, TaskResultError, load_result

_COMMON_SENSE = (
    "boolq",
    "piqa",
    "social_iqa",
    "hellaswag",
    "winogrande",
    "arc_easy",
    "arc_challenge",
    "openbookqa",
)
_CLOSED_BOOK = ("nq_open", "triviaqa", "webqs")


@dataclass(frozen=True)
class Question:
    """A task or a group of tasks; `shots` examples in the prompt, None for the task's own."""

    task: str
    shots: int | None = None

    @property
    def name(self) -> str:
        """Return the name of the result's file, also for a reader."""
        return self.task if self.shots is None else f"{self.task}-{self.shots}shot"


SUITES: dict[str, tuple[Question, ...]] = {
    "commonsense": tuple(Question(task, 0) for task in _COMMON_SENSE),
    "commonsense-5shot": tuple(Question(task, 5) for task in _COMMON_SENSE),
    "closed-book": tuple(Question(task, 0) for task in _CLOSED_BOOK),
    "closed-book-5shot": tuple(Question(task, 5) for task in _CLOSED_BOOK),
    "mmlu": (Question("mmlu", 5),),  # letters A to D, as usual
    "mmlu-texts": (Question("mmlu_continuation", 5),),  # the options' texts, as in the paper's code
}


def questions_of(
    suites: tuple[str, ...], tasks: tuple[str, ...], shots: int | None
) -> list[Question]:
    """Return what to ask, each question once, suites first.

    Raises:
        ValueError: no suite has such a name, shots that no task would have, or nothing to ask.
    """
    unknown = [name for name in suites if name not in SUITES]
    if unknown:
        raise ValueError(f"there is no suite {', '.join(unknown)}; there are {', '.join(SUITES)}")
    if shots is not None and not tasks:
        raise ValueError(
            f"{shots} shots are for tasks that are named one by one, and none is: a suite has its "
            "own number; leave it out, or name tasks"
        )
    asked = [question for name in suites for question in SUITES[name]]
    asked += [Question(task, shots) for task in tasks]
    if not asked:
        raise ValueError(f"nothing to ask: name a suite ({', '.join(SUITES)}) or tasks")
    return list(dict.fromkeys(asked))


class TasksFailed(RuntimeError):
    """Some tasks could not be asked; the results of the others are kept."""


def run_tasks(
    model: Path,
    output: Path,
    load: Callable[[Path, Any], Any],
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
        load: takes such a folder and a torch dtype, and returns the model of transformers.
        suites: names of `SUITES`.
        tasks: names of tasks or groups of lm_eval, or of the task folder.
        shots: examples in the prompts of `tasks`; None is each task's own number.
        task_folder: task descriptions of one's own, which go before lm_eval's; data files that they
            name are relative to it.
        limit: ask only so many questions of each task: to try it out, not to report.
        device: "auto" for a GPU where there is one, else the CPU.

    Returns:
        {question: result} of all that was asked, now or before.

    Raises:
        ValueError: an unknown suite or task, or a model that is not whole; before anything is
            asked.
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
        load,
        task_folder,
        questions,
        device=device,
        batch_size=batch_size,
        limit=limit,
    )
    results: dict[str, TaskResult] = {}
    failed = []
    with progress("tasks", len(questions), "tasks") as advance:
        for question in questions:
            path = output / FOLDER / f"{question.name}.json"
            result = _kept(path, harness.key(question))
            try:
                if result is None:
                    result = harness.ask(question, path.with_suffix(".samples.jsonl.gz"))
                    result.save(path)
                results[question.name] = result
            except TaskDataError as error:
                failed.append(str(error))
            advance(1)
    if failed:
        raise TasksFailed(f"{len(failed)} of {len(questions)} tasks failed: " + "\n".join(failed))
    return results


def _kept(path: Path, key: str) -> TaskResult | None:
    """Return the answer that is there, if it is one to this question."""
    try:
        result = load_result(path)
    except TaskResultError:
        return None
    return result if result.key == key else None
