"""Commands about the machine: what it offers, how fast the loss is on it."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

out = Console(highlight=False, soft_wrap=True)


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
    steps: Annotated[
        int | None,
        typer.Option(
            min=1, help="also training steps of a Megatron GPT, with ours and with its own loss"
        ),
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
    more = {"hidden": hidden, "steps": steps}
    rows = run(chosen, repeats=repeats, **more, counters=counters, output=output)
    for part in tables(rows):
        wide.print(part)


COMMANDS = (doctor, bench)
