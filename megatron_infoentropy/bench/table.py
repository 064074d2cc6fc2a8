"""What `infoentropy bench` prints: a table a case, what was not measured and why, the kernels."""

from collections import defaultdict

from rich import box
from rich.console import JustifyMethod
from rich.table import Table

from megatron_infoentropy.bench.cases import Case
from megatron_infoentropy.bench.results import Row

WIDTH = 200  # a table is as wide as it must be, also in a log file
WHOLE_TABLES = 4  # cases beyond the first so many get a line each


def tables(rows: list[Row]) -> list[Table | str]:
    """Everything worth reading on a screen, in order."""
    cases = list(dict.fromkeys(row.case for row in rows))
    parts: list[Table | str] = []
    for case in cases[:WHOLE_TABLES]:
        of_case = [row for row in rows if row.case == case]
        parts += [_losses(case, of_case), _kernels(of_case), _linear(of_case), _steps(of_case)]
        parts += not_measured(of_case)
    if len(cases) > WHOLE_TABLES:
        parts.append(_line_a_case(rows))
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
    heads = ["loss", "computes", "forward ms", "backward ms", "both ms", "p20-p80"]
    heads += ["x ours", "x in place", "its p20-p80", "GB/s", "peak MiB"]
    if case.tensor_parallel > 1:
        heads += ["collectives", "bytes"]
    title = f"{case}, {whole[0].threads} threads, {whole[0].clock}" if whole else str(case)
    table = table_of(title, heads)
    for row in whole:
        cells = [row.provider, row.computes]
        cells += [number(ms[row.provider, step]) for step in ("forward", "backward", "both")]
        cells += [range_of(row.p20_ms, row.p80_ms), number(row.times_ours)]
        cells += [
            number(row.times_in_place),
            range_of(row.times_in_place_p20, row.times_in_place_p80),
        ]
        cells += [number(row.gb_per_s), number(row.peak_mib)]
        if case.tensor_parallel > 1:
            cells += [str(row.collectives), str(row.collective_bytes)]
        table.add_row(*cells)
    return table


def _kernels(rows: list[Row]) -> Table:
    heads = ["kernel", "", "ms", "p20-p80", "GB/s", "limit", "% of limit", "moved / must move"]
    table = table_of("", heads)
    for row in rows:
        if row.kind in ("kernel", "limit"):
            moved = ""
            if row.bytes and row.dram_read_bytes is not None and row.dram_write_bytes is not None:
                moved = f"{(row.dram_read_bytes + row.dram_write_bytes) / row.bytes:.3f}"
            cells = [
                row.provider,
                row.step,
                number(row.median_ms),
                range_of(row.p20_ms, row.p80_ms),
            ]
            cells += [number(row.gb_per_s), row.limit, number(row.percent_of_limit), moved]
            table.add_row(*cells)
    return table


def _linear(rows: list[Row]) -> Table:
    """The output layer and the loss, fused and unfused."""
    found = [row for row in rows if row.kind == "linear"]
    title = f"{found[0].computes}, forward + backward" if found else ""
    table = table_of(title, ["way", "", "ms", "p20-p80", "peak MiB"])
    for row in found:
        spread = range_of(row.p20_ms, row.p80_ms)
        table.add_row(row.provider, "", number(row.median_ms), spread, number(row.peak_mib))
    return table


def _steps(rows: list[Row]) -> Table:
    """Whole training steps, each rival's time held against ours round by round."""
    found = [row for row in rows if row.kind == "step"]
    title = f"training step, {found[0].computes.partition('; ')[2]}" if found else ""
    heads = ["loss", "computes", "ms", "p20-p80", "ms more than ours", "95 %", "loss, % of step"]
    table = table_of(title, [*heads, "peak MiB"])
    for row in found:
        cells = [row.provider, row.computes.partition("; ")[0], number(row.median_ms)]
        cells += [range_of(row.p20_ms, row.p80_ms), *more_than_ours(row)]
        table.add_row(*cells, number(row.percent_of_step), number(row.peak_mib))
    return table


def more_than_ours(row: Row) -> tuple[str, str]:
    """(median of the paired differences, its interval), signed; of ours nothing."""
    middle, low, high = row.minus_ours_ms, row.minus_ours_low_ms, row.minus_ours_high_ms
    if middle is None or low is None or high is None:
        return "", ""
    return f"{middle:+.1f}", f"{low:+.1f} to {high:+.1f}"


def _line_a_case(rows: list[Row]) -> Table:
    """How many times ours in place everybody takes, a line a case."""
    whole = [row for row in rows if row.kind == "loss" and row.step == "both"]
    names = list(dict.fromkeys(row.provider for row in whole))
    table = table_of("forward + backward, x ours in place", ["case", *names])
    by_case: dict[Case, dict[str, Row]] = defaultdict(dict)
    for row in whole:
        by_case[row.case][row.provider] = row
    for case, found in by_case.items():
        ratios = (number(found[name].times_in_place) if name in found else "" for name in names)
        table.add_row(str(case), *ratios)
    return table


def table_of(title: str, heads: list[str]) -> Table:
    table = Table(title=title or None, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for position, head in enumerate(heads):
        justify: JustifyMethod = "left" if position < 2 else "right"
        table.add_column(head, justify=justify, no_wrap=position == 0)
    return table


def range_of(low: float | None, high: float | None) -> str:
    return "" if low is None or high is None else f"{number(low)}-{number(high)}"


def number(value: float | None) -> str:
    """Three digits that matter, or nothing."""
    if value is None:
        return ""
    if value >= 100:
        return f"{value:.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"
