"""The `infoentropy` command. Each command imports its room inside itself: all start fast."""

import os
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from megatron_infoentropy import __version__
from megatron_infoentropy.commands import convert as convert_commands
from megatron_infoentropy.commands import data as data_commands

app = typer.Typer(
    name="infoentropy",
    help="Pre-train with the InfoEntropy (MiLe) loss: data, training, conversion, evaluation.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
out = Console(highlight=False, soft_wrap=True)


def main() -> None:
    """Run the command line; an expected error is one sentence on stderr and exit code 1."""
    try:
        app()
    except (ValueError, RuntimeError, OSError) as error:
        Console(stderr=True, highlight=False, soft_wrap=True).print(
            f"infoentropy: {error}", markup=False
        )
        sys.exit(1)


@app.callback(invoke_without_command=True)
def about(
    show_version: Annotated[bool, typer.Option("--version", help="print the version")] = False,
) -> None:
    if show_version:
        out.print(__version__)
        raise typer.Exit


for _command in data_commands.COMMANDS:
    app.command()(_command)


@app.command(context_settings={"ignore_unknown_options": True})
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
    places = launch.require_places(data=data, tokenizer=tokenizer, run=run)
    job = launch.TrainingJob(recipe, *places, settings, ranks, extra)
    command = launch.build_command(job)
    out.print(str(command), markup=False)
    if not dry_run:
        launch.train(job, command, sys.stdout.write if verbose else lambda line: None)


for _convert_command in convert_commands.COMMANDS:
    app.command()(_convert_command)


@app.command()
def evaluate(
    model: Annotated[Path, typer.Argument(help="Hugging Face model folder")],
    data: Annotated[Path, typer.Option(help="preprocessed dataset to score")],
    token_counts: Annotated[
        Path, typer.Option(help="token_counts.npy of the training data: defines the buckets")
    ],
    output: Annotated[Path, typer.Option(help="folder for evaluation.json and .npz")],
    max_tokens: Annotated[int | None, typer.Option(help="score about this many only")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda")] = "auto",
) -> None:
    """Perplexity by domain and by how frequent a token is."""
    from megatron_infoentropy.evaluate.perplexity import evaluate_model

    result = evaluate_model(
        model, data, token_counts=token_counts, max_tokens=max_tokens, device=device
    )
    result.save(output)
    for kind in ("domains", "buckets"):
        for name, values in result.summary[kind].items():
            line = f"{name:16} {values['tokens']:9} tokens"
            if values["tokens"]:
                line += f" {values['nats_per_token']:8.4f} nats/token"
                line += f" perplexity {values['perplexity']:10.3f}"
            out.print(line, markup=False)


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(help="run folders to compare")],
    output: Annotated[Path, typer.Option(help="HTML file to write; JSON goes beside it")],
    show: Annotated[bool, typer.Option("--open", help="open it in the browser")] = False,
) -> None:
    """Write one self-contained page that compares runs, with the noise stated."""
    import webbrowser

    from megatron_infoentropy.evaluate.report import write_report

    page = write_report(runs, output)
    out.print(f"report: {page.resolve().as_uri()}")
    if show and (sys.platform == "darwin" or {"DISPLAY", "WAYLAND_DISPLAY"} & os.environ.keys()):
        webbrowser.open(page.resolve().as_uri())  # without a screen it might open in a terminal


@app.command()
def doctor() -> None:
    """Say what this machine offers to training, and what to do about what is missing."""
    from megatron_infoentropy.doctor import examine

    findings = examine()
    marks = {"ok": "ok", "optional": "--", "missing": "!!"}
    for finding in findings:
        out.print(f"{marks[finding.verdict]:3} {finding.subject:24} {finding.found}", markup=False)
        if finding.advice:
            out.print(f"{'':28} {finding.advice}", markup=False)
    if any(finding.verdict == "missing" for finding in findings):
        raise typer.Exit(1)


@app.command()
def bench(
    tokens: Annotated[int, typer.Option(help="rows of logits")] = 2048,
    vocabulary: Annotated[int, typer.Option(help="columns of logits, over all ranks")] = 32000,
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16")] = "float32",
    tensor_parallel: Annotated[
        int, typer.Option(min=1, help="ranks to split the vocabulary over")
    ] = 1,
    grid: Annotated[
        str | None, typer.Option(help="small or full: measure these shapes instead")
    ] = None,
    tiny: Annotated[bool, typer.Option("--tiny", help="shrink all shapes, to try it out")] = False,
    compiled: Annotated[
        bool, typer.Option(help="also what torch.compile makes of the peers (seconds each)")
    ] = True,
    repeats: Annotated[int, typer.Option(min=1, help="passes per provider")] = 5,
    hidden: Annotated[
        int | None, typer.Option(help="also an output layer of this size, fused and unfused")
    ] = None,
    counters: Annotated[
        bool, typer.Option("--counters", help="also count the bytes moved, by ncu (GPU)")
    ] = False,
    output: Annotated[
        Path | None, typer.Option(help="CSV file to write, or a folder to name it in")
    ] = None,
) -> None:
    """Time and memory of the loss beside its peers, in one run, as ratios."""
    from megatron_infoentropy.bench import cases
    from megatron_infoentropy.bench.run import bench as run
    from megatron_infoentropy.bench.table import WIDTH, tables

    shape = (tokens, vocabulary, dtype, tensor_parallel)
    chosen = cases.grid(grid) if grid else [cases.Case(*shape)]  # type: ignore[arg-type]
    chosen = cases.adapt(chosen, tiny=tiny, compiled=compiled)
    wide = Console(highlight=False, soft_wrap=True, width=max(out.width, WIDTH))
    rows = run(chosen, repeats=repeats, hidden=hidden, counters=counters, output=output)
    for part in tables(rows):
        wide.print(part)
