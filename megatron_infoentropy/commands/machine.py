"""Commands about the machine: what it offers, how fast the loss is on it."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

if TYPE_CHECKING:
    from megatron_infoentropy.doctor.job import Report

out = Console(highlight=False, soft_wrap=True)


def doctor(
    recipe: Annotated[
        Path | None, typer.Argument(help="with --distributed: count and measure for this recipe")
    ] = None,
    distributed: Annotated[
        bool, typer.Option("--distributed", help="look at all ranks of a job, before it trains")
    ] = False,
    ranks: Annotated[
        int, typer.Option(min=1, help="start so many on this machine (without torchrun)")
    ] = 2,
    data: Annotated[
        Path | None, typer.Option(help="folder with train/, validation/, test/: verify checksums")
    ] = None,
    tokenizer: Annotated[
        Path | None, typer.Option(help="must be the one that the data were made with")
    ] = None,
    run: Annotated[Path, typer.Option(help="where the run will write: is there room?")] = Path(),
    disk_gib: Annotated[float, typer.Option(min=0, help="room wanted there")] = 20,
    timeout: Annotated[int, typer.Option(min=1, help="seconds to wait for a rank")] = 120,
) -> None:
    """Say what this machine offers to training, and what to do about what is missing.

    With --distributed: whether the ranks of a job can work together. Under torchrun it is one rank
    of them (torchrun ... -m megatron_infoentropy doctor --distributed), else it starts --ranks.
    """
    if not distributed:
        if recipe is not None:
            raise ValueError("doctor takes a recipe with --distributed only")
        _say_findings()
        return
    from megatron_infoentropy.doctor.job import Order, examine_job, start_ranks

    order = Order(recipe, data, tokenizer, run, int(disk_gib * 2**30), timeout)
    report = examine_job(order) if "RANK" in os.environ else start_ranks(order, ranks)
    if report is not None:
        _say_report(report)
        if report.troubles:
            raise typer.Exit(1)


def _say_findings() -> None:
    from megatron_infoentropy.doctor import examine

    findings = examine()
    marks = {"ok": "ok", "optional": "--", "missing": "!!"}
    for finding in findings:
        out.print(f"{marks[finding.verdict]:3} {finding.subject:24} {finding.found}", markup=False)
        if finding.advice:
            out.print(f"{'':28} {finding.advice}", markup=False)
    if any(finding.verdict == "missing" for finding in findings):
        raise typer.Exit(1)


def _say_report(report: "Report") -> None:
    out.print(f"{'rank':4} {'host':20} {'device':24} {'memory':>9} {'disk':>9} {'clock':>9}")
    for one in report.facts:
        sizes = f"{one.memory / 2**30:5.1f} GiB {one.disk / 2**30:5.1f} GiB"
        line = f"{one.rank:4} {one.host:20} {one.device:24} {sizes} {1e3 * one.clock_s:6.1f} ms"
        out.print(line, markup=False)
    versions = ", ".join(f"{name} {found}" for name, found in report.facts[0].versions.items())
    out.print(f"versions of rank 0: {versions}", markup=False)
    for measured in report.measured:
        transfer = measured.transfer
        what = f"{transfer.kind} over {transfer.ranks} ranks, {transfer.bytes / 2**20:.2f} MiB"
        out.print(f"{transfer.name}: {what}: {measured.gbps:.2f} GB/s", markup=False)
    for trouble in report.troubles:
        out.print(f"!!  {trouble}", markup=False)
    if not report.troubles:
        out.print(f"ok  {len(report.facts)} ranks can work together", markup=False)


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
