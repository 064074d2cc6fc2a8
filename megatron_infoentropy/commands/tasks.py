"""The command that puts the usual tasks to a model."""

from pathlib import Path
from typing import Annotated

import typer

from megatron_infoentropy.console import make_console

out = make_console()


def tasks(
    model: Annotated[Path, typer.Argument(help="Hugging Face model folder")],
    output: Annotated[Path, typer.Option(help="run folder: results go to tasks/ in it")],
    suite: Annotated[
        list[str] | None,
        typer.Option(
            help="commonsense, commonsense-5shot, closed-book, mmlu or mmlu-texts; repeatable"
        ),
    ] = None,
    task: Annotated[
        list[str] | None, typer.Option(help="a task or group of lm_eval by name; repeatable")
    ] = None,
    shots: Annotated[
        int | None, typer.Option(min=0, help="examples in the prompt of --task; default: its own")
    ] = None,
    task_folder: Annotated[
        Path | None, typer.Option(help="task descriptions (YAML) of your own, on local data")
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="questions of each task: to try it out")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda")] = "auto",
    batch_size: Annotated[int, typer.Option(min=1, help="prompts at a time")] = 8,
) -> None:
    """Put tasks of lm-evaluation-harness to an exported model; the report shows the results.

    Ended by whatever, the same command goes on with the next task.
    """
    from megatron_infoentropy.tasks.ask import run_tasks

    results = run_tasks(
        model,
        output,
        suites=tuple(suite or ()),
        tasks=tuple(task or ()),
        shots=shots,
        task_folder=task_folder,
        limit=limit,
        device=device,
        batch_size=batch_size,
    )
    for name, result in results.items():
        for metric, number in result.metrics.items():
            error = "" if number.stderr is None else f" +- {number.stderr:.4f}"
            line = f"{name:28} {metric:28} {number.value:8.4f}{error}  ({result.samples} questions)"
            out.print(line)


COMMANDS = (tasks,)
