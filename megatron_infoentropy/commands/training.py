"""The command that trains, and says beforehand what a run would take."""

import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from megatron_infoentropy.console import make_console

out = make_console()


Recipe = Annotated[Path, typer.Argument(help="YAML of Megatron flags; see examples/")]
MegatronFlags = Annotated[
    list[str] | None, typer.Argument(help="more Megatron flags, after --; the last one counts")
]
Data = Annotated[Path | None, typer.Option(help="folder with train/, validation/, test/ datasets")]
Tokenizer = Annotated[Path | None, typer.Option(help="Hugging Face tokenizer folder")]
Run = Annotated[Path | None, typer.Option(help="folder for this run: log, checkpoints, facts")]
Objective = Annotated[str | None, typer.Option(help="infoentropy, focal or cross_entropy")]
Gamma = Annotated[float | None, typer.Option(help="exponent of the weight")]
Sigma = Annotated[float | None, typer.Option(help="added to the entropy, nats")]
Normalization = Annotated[str | None, typer.Option(help="paper, global or none")]
Seed = Annotated[int | None, typer.Option(help="of initialisation and data order")]
TensorParallel = Annotated[int | None, typer.Option(min=1, help="vocabulary and weight shards")]
PipelineParallel = Annotated[int | None, typer.Option(min=1, help="pipeline stages")]
Switch = Annotated[
    bool,
    typer.Option(
        "--switch", help="go on from the run's checkpoint with another loss or seed; run.json tells"
    ),
]
Verbose = Annotated[bool, typer.Option("--verbose", help="show all that Megatron says")]


def training_settings(
    objective: str | None,
    gamma: float | None,
    sigma: float | None,
    normalization: str | None,
    seed: int | None,
    tensor_parallel: int | None,
    pipeline_parallel: int | None,
) -> dict[str, Any]:
    """Options that are Megatron's flags or ours, by the flag's name."""
    from megatron_infoentropy.launch.recipe import loss_flags

    loss = {"objective": objective, "gamma": gamma, "sigma": sigma, "normalization": normalization}
    return loss_flags(loss) | {
        "seed": seed,
        "tensor-model-parallel-size": tensor_parallel,
        "pipeline-model-parallel-size": pipeline_parallel,
    }


def warn(words: list[str]) -> None:
    """Say on stderr what of a training's command line is hardly ever meant."""
    from megatron_infoentropy.launch.recipe import warnings

    for warning in warnings(words):
        typer.echo(warning, err=True)


def next_step(run: Path, tokenizer: Path) -> str:
    """Return the command that exports a trained model, or why it would refuse."""
    from megatron_infoentropy.convert import why_not_exported

    if reason := why_not_exported(run / "checkpoints"):
        return f"no export to Hugging Face: {reason}"
    words = [run / "checkpoints", "--tokenizer", tokenizer, "--output", run / "hf"]
    return f"next: infoentropy convert {shlex.join(map(str, words))}"


def train(
    recipe: Recipe,
    megatron_flags: MegatronFlags = None,
    *,
    data: Data = None,
    tokenizer: Tokenizer = None,
    run: Run = None,
    objective: Objective = None,
    gamma: Gamma = None,
    sigma: Sigma = None,
    normalization: Normalization = None,
    seed: Seed = None,
    tensor_parallel: TensorParallel = None,
    pipeline_parallel: PipelineParallel = None,
    switch: Switch = False,
    ranks: Annotated[
        int | None, typer.Option(min=1, help="processes; default: as many as GPUs and batch allow")
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="start nothing: check flags, count memory and traffic at any --ranks"
        ),
    ] = False,
    verbose: Verbose = False,
) -> None:
    """Train with Megatron: runs torchrun for you, prints its command, keeps its log.

    What no option says, the recipe says; what it does not say is as published (infoentropy, gamma
    1, sigma 1, paper), seed 1234, one shard, one stage. A dry run needs no folders; given all of
    them it also prints the command.
    """
    from megatron_infoentropy.launch import train as launch
    from megatron_infoentropy.launch.job import TrainingJob, require_places

    settings = training_settings(
        objective, gamma, sigma, normalization, seed, tensor_parallel, pipeline_parallel
    )
    extra = tuple(megatron_flags or ())
    if dry_run:
        from megatron_infoentropy.launch.dry_run import dry_run as count

        for line in count(recipe, settings, extra, tokenizer=tokenizer, ranks=ranks).lines():
            out.print(line)
        if None in (data, tokenizer, run):
            return
    places = require_places(data=data, tokenizer=tokenizer, run=run)
    job = TrainingJob(recipe, *places, settings, ranks, extra, switch)
    command = launch.build_command(job)
    warn(command.words)
    out.print(str(command))
    if not dry_run:
        said = launch.train(job, command, sys.stdout.write if verbose else lambda line: None)
        out.print(said.outcome())
        goes_on = "next: the same command goes on from there"
        out.print(goes_on if said.was_stopped else next_step(job.run, job.tokenizer))


COMMANDS = (train,)
