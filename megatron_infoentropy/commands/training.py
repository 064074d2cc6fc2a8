"""The command that trains, and says beforehand what a run would take."""

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

out = Console(highlight=False, soft_wrap=True)


def train(
    recipe: Annotated[Path, typer.Argument(help="YAML of Megatron flags; see examples/")],
    megatron_flags: Annotated[
        list[str] | None, typer.Argument(help="more Megatron flags, after --; the last one counts")
    ] = None,
    *,
    data: Annotated[
        Path | None, typer.Option(help="folder with train/, validation/, test/ datasets")
    ] = None,
    tokenizer: Annotated[Path | None, typer.Option(help="Hugging Face tokenizer folder")] = None,
    run: Annotated[
        Path | None, typer.Option(help="folder for this run: log, checkpoints, facts")
    ] = None,
    objective: Annotated[
        str | None, typer.Option(help="infoentropy, focal or cross_entropy")
    ] = None,
    gamma: Annotated[float | None, typer.Option(help="exponent of the weight")] = None,
    sigma: Annotated[float | None, typer.Option(help="added to the entropy, nats")] = None,
    normalization: Annotated[str | None, typer.Option(help="paper, global or none")] = None,
    seed: Annotated[int | None, typer.Option(help="of initialisation and data order")] = None,
    tensor_parallel: Annotated[
        int | None, typer.Option(min=1, help="vocabulary and weight shards")
    ] = None,
    pipeline_parallel: Annotated[int | None, typer.Option(min=1, help="pipeline stages")] = None,
    ranks: Annotated[
        int | None, typer.Option(help="processes; default: what the GPUs and the batch allow")
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="start nothing: check flags, count memory and traffic at any --ranks"
        ),
    ] = False,
    verbose: Annotated[bool, typer.Option("--verbose", help="show all that Megatron says")] = False,
) -> None:
    """Train with Megatron: runs torchrun for you, prints its command, keeps its log.

    What no option says, the recipe says; what it does not say is as published (infoentropy, gamma
    1, sigma 1, paper), seed 1234, one shard, one stage. A dry run needs no folders; given all of
    them it also prints the command.
    """
    from megatron_infoentropy.launch import train as launch
    from megatron_infoentropy.launch.flags import loss_flags
    from megatron_infoentropy.launch.job import TrainingJob, require_places

    loss = {"objective": objective, "gamma": gamma, "sigma": sigma, "normalization": normalization}
    settings = loss_flags(loss) | {
        "seed": seed,
        "tensor-model-parallel-size": tensor_parallel,
        "pipeline-model-parallel-size": pipeline_parallel,
    }
    extra = tuple(megatron_flags or ())
    if dry_run:
        from megatron_infoentropy.launch.dry_run import dry_run as count

        for line in count(recipe, settings, extra, tokenizer=tokenizer, ranks=ranks).lines():
            out.print(line, markup=False)
        if None in (data, tokenizer, run):
            return
    places = require_places(data=data, tokenizer=tokenizer, run=run)
    job = TrainingJob(recipe, *places, settings, ranks, extra)
    command = launch.build_command(job)
    out.print(str(command), markup=False)
    if not dry_run:
        launch.train(job, command, sys.stdout.write if verbose else lambda line: None)


COMMANDS = (train,)
