"""What `infoentropy bench-recipe` prints."""

from rich.table import Table

from megatron_infoentropy.bench.parts import PARTS
from megatron_infoentropy.bench.recipe_rows import RecipeRow
from megatron_infoentropy.bench.table import number, range_of, table_of


def recipe_tables(rows: list[RecipeRow]) -> list[Table | str]:
    """The training in words, its losses, the parts of their steps, and what was left out."""
    timed = [row for row in rows if row.rounds]
    return [_words(rows[0]), _losses(timed), _parts(timed), *_left_out(rows)]


def _words(row: RecipeRow) -> str:
    size = f"{row.parameters:,} parameters" if row.parameters else f"{row.layers} layers"
    held = f", {row.held_gib:.1f} GiB held on a GPU" if row.held_gib else ""
    return (
        f"{row.recipe}: {size}, {row.precision}, {row.layout}, {row.tokens:,} tokens a step in "
        f"micro-batches of {row.micro_batch_tokens:,}{held}; a matrix product reaches "
        f"{row.matmul_tflops:.3g} TFLOP/s"
    )


def _losses(rows: list[RecipeRow]) -> Table:
    heads = ["loss", "by", "ms a step", "p20-p80", "ms more than the first", "95 %", "% more"]
    heads += ["tokens/s", "TFLOP/s", "% of the product", "% of peak", "peak MiB"]
    table = table_of(f"training steps, {rows[0].rounds} rounds", heads)
    for row in rows:
        cells = [row.loss, row.by, number(row.median_ms), range_of(row.p20_ms, row.p80_ms)]
        cells += [*_more(row, rows[0]), number(row.tokens_per_s), f"{row.tflops:.3g}"]
        cells += [_percent(row.tflops, whole) for whole in (row.matmul_tflops, row.peak_tflops)]
        cells += [number(row.peak_mib)]
        table.add_row(*cells)
    return table


def _more(row: RecipeRow, first: RecipeRow) -> tuple[str, str, str]:
    """(paired difference, its interval, its share of the first loss's step), signed."""
    middle, low, high = row.minus_first_ms, row.minus_first_low_ms, row.minus_first_high_ms
    if middle is None or low is None or high is None or not first.median_ms:
        return "", "", ""
    share = 100 * middle / first.median_ms
    return f"{middle:+.2f}", f"{low:+.2f} to {high:+.2f}", f"{share:+.2f}"


def _percent(part: float | None, whole: float | None) -> str:
    return number(100 * part / whole) if part and whole else ""


def _parts(rows: list[RecipeRow]) -> Table:
    table = table_of("median ms of a step's parts", ["loss", "", *PARTS, "loss, % of step"])
    for row in rows:
        spent = [getattr(row, f"{part}_ms") for part in PARTS]
        share = _percent(row.loss_ms, row.median_ms)
        table.add_row(row.loss, row.by, *map(number, spent), share)
    return table


def _left_out(rows: list[RecipeRow]) -> list[str]:
    return [f"not measured: {row.loss}: {row.reason}" for row in rows if row.reason]
