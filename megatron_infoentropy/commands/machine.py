"""Commands about the machine: what it offers, how fast the loss and a recipe's steps are on it."""

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from megatron_infoentropy.commands import out, training

CsvFile = Annotated[Path | None, typer.Option(help="CSV file to write, or a folder to name it in")]


def doctor(
    context: typer.Context,
    recipe: Annotated[
        Path | None,
        typer.Argument(help="also check and count this recipe; measure for it if --distributed"),
    ] = None,
    megatron_flags: training.MegatronFlags = None,
    *,
    distributed: Annotated[
        bool, typer.Option("--distributed", help="look at all ranks of a job, before it trains")
    ] = False,
    ranks: Annotated[
        int, typer.Option(min=1, help="start so many on this machine (without torchrun)")
    ] = 2,
    tensor_parallel: training.TensorParallel = None,
    pipeline_parallel: training.PipelineParallel = None,
    data: Annotated[
        Path | None, typer.Option(help="folder with train/, validation/, test/: open each file")
    ] = None,
    tokenizer: Annotated[
        Path | None, typer.Option(help="must be the one that the data were made with")
    ] = None,
    run: Annotated[Path, typer.Option(help="where the run will write: is there room?")] = Path(),
    disk_gib: Annotated[float, typer.Option(min=0, help="room wanted there")] = 20,
    timeout: Annotated[int, typer.Option(min=1, help="seconds to wait for a rank")] = 120,
) -> None:
    """Say what this machine offers to training, and what to do about what is missing.

    With --distributed: whether the ranks of a job can work together; exit code 1 if not. It starts
    --ranks here, or is one rank under torchrun: torchrun ... -m -- megatron_infoentropy doctor
    --distributed ... (its -- keeps --run from torchrun, which has an option that begins so).
    """
    settings = training.parallel_settings(tensor_parallel, pipeline_parallel)
    flags = tuple(megatron_flags or ())
    if not distributed:
        _refuse_ignored(context)
        is_whole = _say_findings()
        if recipe is not None:
            from megatron_infoentropy.launch.dry_run import dry_run, report

            for line in report(dry_run(recipe, settings, flags, tokenizer=tokenizer)):
                out.print(line)
        raise typer.Exit(0 if is_whole else 1)
    from megatron_infoentropy.doctor.smoke import Order, examine_job, start_ranks

    if "RANK" not in os.environ:
        raise typer.Exit(start_ranks(sys.argv[2:], ranks))
    disk = int(disk_gib * 2**30)
    order = Order(recipe, settings, flags, data, tokenizer, run, disk, timeout)
    if examine_job(order, out.print):
        raise typer.Exit(1)


def _refuse_ignored(context: typer.Context) -> None:
    """Raise ValueError for options that only the look at all ranks obeys."""
    for name in ("ranks", "data", "run", "disk_gib", "timeout"):
        source = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            option = f"--{name.replace('_', '-')}"
            raise ValueError(f"{option} is for --distributed: add that, or leave {option} out")


def _say_findings() -> bool:
    """Whether nothing is missing."""
    from megatron_infoentropy.doctor import examine

    findings = examine()
    marks = {"ok": "ok", "optional": "--", "missing": "!!"}
    for finding in findings:
        out.print(f"{marks[finding.verdict]:3} {finding.subject:24} {finding.found}")
        if finding.advice:
            out.print(f"{'':28} {finding.advice}")
    return all(finding.verdict != "missing" for finding in findings)


def bench(
    tokens: Annotated[int, typer.Option(help="rows of logits")] = 2048,
    vocabulary: Annotated[int, typer.Option(help="columns of logits, over all ranks")] = 32000,
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16")] = "float32",
    tensor_parallel: Annotated[
        int, typer.Option(min=1, help="ranks to split the vocabulary over")
    ] = 1,
    grid: Annotated[
        str | None, typer.Option(help="small, headline, full or tiny: measure these shapes instead")
    ] = None,
    compiled: Annotated[
        bool, typer.Option(help="also what torch.compile makes of the peers (seconds each)")
    ] = True,
    repeats: Annotated[int, typer.Option(min=1, help="passes per provider")] = 5,
    hidden: Annotated[
        int | None, typer.Option(min=1, help="also an output layer of this size, fused and unfused")
    ] = None,
    output: CsvFile = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="keep what the output has of this device and commit")
    ] = False,
) -> None:
    """Time and memory of the loss beside its peers, in one run, as ratios."""
    from megatron_infoentropy.bench import cases
    from megatron_infoentropy.bench.run import bench as run
    from megatron_infoentropy.bench.table import tables

    shape = (tokens, vocabulary, dtype, tensor_parallel)
    chosen = cases.grid(grid) if grid else [cases.Case(*shape)]  # type: ignore[arg-type]
    for part in tables(
        run(chosen, repeats=repeats, compiled=compiled, hidden=hidden, output=output, resume=resume)
    ):
        out.print(part)


def bench_recipe(
    recipe: training.Recipe,
    megatron_flags: training.MegatronFlags = None,
    *,
    data: training.Data = None,
    tokenizer: training.Tokenizer = None,
    tensor_parallel: training.TensorParallel = None,
    pipeline_parallel: training.PipelineParallel = None,
    ranks: Annotated[
        int | None,
        typer.Option(min=1, help="processes; default: what the GPUs and the batch allow"),
    ] = None,
    rounds: Annotated[int, typer.Option(min=3, help="timed steps of every loss")] = 20,
    loss: Annotated[
        list[str] | None, typer.Option(help="only this loss, by its name in the table; repeatable")
    ] = None,
    output: CsvFile = None,
) -> None:
    """Time and memory of a recipe's training steps, with our losses and with Megatron's own.

    Megatron's trainer runs the recipe; the losses take turns in it, a step each, in rounds, so that
    what else the machine does falls on all of them. Nothing is loaded or saved. Without --data the
    tokens are made up.
    """
    from megatron_infoentropy.bench.recipe_run import bench_recipe as run
    from megatron_infoentropy.bench.recipe_run import recipe_tables

    rows = run(
        recipe,
        training.parallel_settings(tensor_parallel, pipeline_parallel),
        tuple(megatron_flags or ()),
        data=data,
        tokenizer=tokenizer,
        ranks=ranks,
        rounds=rounds,
        losses=tuple(loss or ()),
        output=output,
    )
    for part in recipe_tables(rows):
        out.print(part)
