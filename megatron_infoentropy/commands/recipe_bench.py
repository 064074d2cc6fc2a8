"""The command that measures a recipe's training on this machine."""

from pathlib import Path
from typing import Annotated

import typer

from megatron_infoentropy.commands.training import (
    Data,
    MegatronFlags,
    PipelineParallel,
    Recipe,
    TensorParallel,
    Tokenizer,
)
from megatron_infoentropy.console import make_console

out = make_console()


def bench_recipe(
    recipe: Recipe,
    megatron_flags: MegatronFlags = None,
    *,
    data: Data = None,
    tokenizer: Tokenizer = None,
    tensor_parallel: TensorParallel = None,
    pipeline_parallel: PipelineParallel = None,
    ranks: Annotated[
        int | None,
        typer.Option(min=1, help="processes; default: what the GPUs and the batch allow"),
    ] = None,
    rounds: Annotated[int, typer.Option(min=3, help="timed steps of every loss")] = 20,
    loss: Annotated[
        list[str] | None, typer.Option(help="only this loss, by its name in the table; repeatable")
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="CSV file to write, or a folder to name it in")
    ] = None,
) -> None:
    """Time and memory of a recipe's training steps, with our losses and with Megatron's own.

    Megatron's trainer runs the recipe; the losses take turns in it, a step each, in rounds, so that
    what else the machine does falls on all of them. Nothing is loaded or saved. Without --data the
    tokens are made up.
    """
    from megatron_infoentropy.bench.recipe_run import bench_recipe as run
    from megatron_infoentropy.bench.recipe_run import recipe_tables
    from megatron_infoentropy.bench.table import WIDTH

    settings = {
        "tensor-model-parallel-size": tensor_parallel,
        "pipeline-model-parallel-size": pipeline_parallel,
    }
    rows = run(
        recipe,
        settings,
        tuple(megatron_flags or ()),
        data=data,
        tokenizer=tokenizer,
        ranks=ranks,
        rounds=rounds,
        losses=tuple(loss or ()),
        output=output,
    )
    wide = make_console(width=max(out.width, WIDTH))
    for part in recipe_tables(rows):
        wide.print(part)


COMMANDS = (bench_recipe,)
