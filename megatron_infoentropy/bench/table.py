"""The tables that `infoentropy bench` prints of every case, what was not measured, and why."""

from collections import defaultdict

from rich import box
from rich.console import JustifyMethod
from rich.table import Table

from megatron_infoentropy.bench.cases import Case
from megatron_infoentropy.bench.results import Row


def tables(rows: list[Row]) -> list[Table | str]:
    """Everything worth reading on a screen, in order."""
    parts: list[Table | str] = []
    for case in dict.fromkeys(row.case for row in rows):
        of_case = [row for row in rows if row.case == case]
        parts += [_losses(case, of_case), _kernels(of_case)]
        for layer in dict.fromkeys(row.computes for row in of_case if row.kind == "linear"):
            parts.append(_output_layer([row for row in of_case if row.computes == layer]))
        parts += not_measured(of_case)
    return [part for part in parts if not isinstance(part, Table) or part.row_count]


def not_measured(rows: list[Row]) -> list[str]:
    """Sentences that name what is missing, one a reason."""
    missing: dict[str, list[str]] = defaultdict(list)
    for row in rows:
        if row.kind == "unavailable":
            missing[row.reason].append(row.provider)
    return [f"not measured: {', '.join(names)}: {why}" for why, names in missing.items()]


def _losses(case: Case, rows: list[Row]) -> Table:
    whole = [row for row in rows if row.kind == "loss" and row.step == "both"]
    ms = {(row.provider, row.step): row.median_ms for row in rows if row.kind == "loss"}
    heads = ["loss", "computes", "forward ms", "backward ms", "both ms (p20-p80)"]
    heads += ["x in place (p20-p80)", "GB/s", "MiB beside the logits"]
    sends = any(row.collectives for row in whole)
    heads += ["collectives, bytes a token"] if sends else []
    title = f"{case}, {whole[0].threads} threads, {whole[0].clock}" if whole else str(case)
    table = table_of(title, heads)
    for row in whole:
        in_place = row.times_in_place, row.times_in_place_p20, row.times_in_place_p80
        cells = [row.provider, row.computes]
        cells += [number(ms.get((row.provider, step))) for step in ("forward", "backward")]
        cells += [time_of(row), with_range(*in_place)]
        cells += [number(row.gb_per_s), number(row.peak_mib)]
        if sends:
            cells.append(f"{row.collectives}, {(row.collective_bytes or 0) / row.tokens:.0f}")
        table.add_row(*cells)
    return table


def _kernels(rows: list[Row]) -> Table:
    table = table_of("", ["alone", "", "ms (p20-p80)", "GB/s", "% of"])
    for row in rows:
        if row.kind in ("kernel", "limit"):
            share = f"{number(row.percent_of_limit)} of {row.limit}" if row.limit else ""
            table.add_row(row.provider, row.step, time_of(row), number(row.gb_per_s), share)
    return table


def _output_layer(rows: list[Row]) -> Table:
    heads = ["output layer and loss", "", "ms (p20-p80)", "MiB beside the inputs"]
    heads += ["x fused loss: ms, MiB"]
    table = table_of(f"{rows[0].computes}, forward + backward", heads)
    fused = next(row for row in rows if row.provider.startswith("fused loss"))
    for row in rows:
        ms = _times(row.median_ms, fused.median_ms)
        mib = _times(row.peak_mib, fused.peak_mib)
        table.add_row(row.provider, "", time_of(row), number(row.peak_mib), f"{ms}, {mib}")
    return table


def _times(value: float | None, whole: float | None) -> str:
    return number(value / whole) if value and whole else ""


def table_of(title: str, heads: list[str]) -> Table:
    table = Table(title=title or None, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for position, head in enumerate(heads):
        justify: JustifyMethod = "left" if position < 2 else "right"
        table.add_column(head, justify=justify, no_wrap=position == 0)
    return table


def time_of(row: Row) -> str:
    """Return the median of the times, in brackets the middle 60 %."""
    return with_range(row.median_ms, row.p20_ms, row.p80_ms)


def with_range(median: float | None, low: float | None, high: float | None) -> str:
    if median is None or low is None or high is None:
        return number(median)
    return f"{number(median)} ({number(low)}-{number(high)})"


def number(value: float | None) -> str:
    """Three digits that matter, or nothing."""
    if value is None:
        return ""
    if value >= 100:
        return f"{value:.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"
