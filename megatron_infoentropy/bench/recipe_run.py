"""`infoentropy bench-recipe`: what a training costs, and what its loss costs beside Megatron's own.

Megatron's trainer runs the recipe for some dozens of steps on this machine. Several losses take
turns in it, a step each (`bench.recipe_losses`), on one model, one optimizer, one stream of data.

`torchrun -m megatron_infoentropy.bench.recipe_run FOLDER ROUNDS LOSSES FLAGS` is one rank of it: it
leaves rank-N.json in the folder, its `RecipeRow`s. LOSSES are a JSON list of names, empty for all.
FLAGS are those of `megatron_infoentropy.pretrain`.
"""

import json
import shutil
import sys
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.table import Table

from megatron_infoentropy.bench.results import file_to_write, provenance, write_csv
from megatron_infoentropy.bench.table import number, table_of, with_range
from megatron_infoentropy.config import InfoEntropyConfig
from megatron_infoentropy.launch.job import command_line, require_layout
from megatron_infoentropy.launch.recipe import (
    last_value,
    machine_environment,
    read_facts,
    read_loss,
    useful_ranks,
)
from megatron_infoentropy.launch.run_folder import LOG, parameters_in
from megatron_infoentropy.launch.train import follow
from megatron_infoentropy.runtime import cpu, orphans
from megatron_infoentropy.runtime.device import find_device

PARTS = ("forward", "loss", "backward", "gradients", "optimizer")  # of a step, in order
# Every step pays for a report, ours and Megatron's: more than a training that logs now and then.
NOTHING_ELSE = ("--log-interval=1", "--eval-iters=0", "--eval-interval=1000000")
# Megatron's own losses: name -> (cross_entropy_loss_fusion, cross_entropy_fusion_impl)
FUSIONS = {
    "megatron unfused": (False, "native"),
    "megatron fused": (True, "native"),
    "megatron fused by Transformer Engine": (True, "te"),
}


@dataclass(frozen=True)
class RecipeRow:
    """One loss of a recipe; what does not apply is None, and empty in the file."""

    recipe: str
    parameters: int | None
    layers: int
    hidden_size: int
    vocabulary: int
    precision: str
    layout: str
    ranks: int
    tokens: int  # a step, over all ranks
    micro_batch_tokens: int
    loss: str
    by: str  # "ours" or "peer"
    rounds: int | None = None
    median_ms: float | None = None  # of a step
    p20_ms: float | None = None
    p80_ms: float | None = None
    minus_first_ms: float | None = None  # median of the paired differences from the recipe's loss
    minus_first_low_ms: float | None = None  # its 95 % interval
    minus_first_high_ms: float | None = None
    tokens_per_s: float | None = None  # over all ranks
    tflops: float | None = None  # of the model, a rank, recomputation not counted
    peak_tflops: float | None = None  # dense bf16, as the card's maker states it
    forward_ms: float | None = None  # medians; they need not add up to the step's
    loss_ms: float | None = None
    backward_ms: float | None = None
    gradients_ms: float | None = None
    optimizer_ms: float | None = None
    peak_mib: float | None = None  # of the fullest rank's step, beside what lives between steps
    held_gib: float | None = None  # the most that the allocator took of a GPU, over all losses
    reason: str = ""  # why there is no time


def bench_recipe(
    recipe: Path,
    settings: dict[str, Any],
    extra_flags: tuple[str, ...] = (),
    *,
    data: Path | None = None,
    tokenizer: Path | None = None,
    ranks: int | None = None,
    rounds: int = 20,
    losses: tuple[str, ...] = (),
    output: Path | None = None,
) -> list[RecipeRow]:
    """A row a loss, the recipe's own first, or of these losses alone; settings and flags as in
    `TrainingJob`. Where the training ends early (--exit-duration-in-mins) there are fewer rounds.

    Without data Megatron makes some up. Rows are written to `output`, a file or a folder to
    name it in, where that is given.

    Raises:
        ValueError: a recipe, a layout or a loss that cannot be, or results without the commit they
            belong to.
        TrainingFailed: with what the ranks said.
    """
    facts = provenance() if output else {}  # refuses before the work, not after it
    device = find_device()
    flags = (*extra_flags, *NOTHING_ELSE)
    words = command_line(device, recipe, settings, flags, data=data, tokenizer=tokenizer)
    layout = read_facts(words)
    if layout["train_iters"] is None:
        raise ValueError("bench-recipe needs a recipe with train-iters, not train-samples")
    _require_nothing_kept(words)
    _require_known(losses, [*own_losses(read_loss(words)), *FUSIONS])
    ranks = ranks or useful_ranks(layout, device.count if device.type == "cuda" else 1)
    require_layout(ranks, layout)
    # Not a folder that goes away by itself: where the training fails, its log is told of.
    folder = Path(tempfile.mkdtemp(prefix="bench-recipe-"))
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--standalone")
    asked = (str(folder), str(rounds), json.dumps(losses))
    entry = ("--nproc-per-node", str(ranks), "-m", "megatron_infoentropy.bench.recipe_run", *asked)
    environment = machine_environment(device, ranks)
    run = folder / recipe.stem
    follow(run, [*torchrun, *entry, *words], environment)
    parameters = parameters_in(run / LOG)
    of_ranks = [_rows_of_rank(folder, rank) for rank in range(ranks)]
    shutil.rmtree(folder)
    rows = rows_of_all(of_ranks, recipe=recipe.stem, parameters=parameters)
    if output:
        path = file_to_write(output, facts, f"recipe_{recipe.stem}")
        write_csv([asdict(row) for row in rows], facts, path)
    return rows


def own_losses(config: InfoEntropyConfig) -> dict[str, InfoEntropyConfig]:
    """Return our losses by name: the recipe's own, plain cross entropy, and fused the other way."""
    unweighted = replace(config.at(0), objective="cross_entropy", weighting="")
    other_way = replace(config, fused_linear=not config.fused_linear)
    return {_name_of(each): each for each in (config, unweighted, other_way)}


def _name_of(config: InfoEntropyConfig) -> str:
    name = config.objective.replace("_", " ")
    return f"{name}, fused linear" if config.fused_linear else name


def _require_nothing_kept(words: list[str]) -> None:
    """Refuse what would leave the measured steps among a training's checkpoints and curves."""
    for name in ("save", "load", "tensorboard-dir", "wandb-project"):
        value = last_value(words, name)
        if value:
            raise ValueError(
                f"bench-recipe loads and keeps nothing, and --{name} {value} would: leave it out "
                "of the flags, or of a copy of the recipe"
            )


def _require_known(names: tuple[str, ...], known: list[str]) -> None:
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(
            f"expected losses among {', '.join(map(repr, known))}, got "
            f"{', '.join(map(repr, unknown))}: give --loss a name of these"
        )


def _rows_of_rank(folder: Path, rank: int) -> list[RecipeRow]:
    path = folder / f"rank-{rank}.json"
    if not path.exists():
        raise ValueError(
            f"the training ended before every loss had taken a step; its log is under {folder}"
        )
    return [RecipeRow(**row) for row in json.loads(path.read_text(encoding="utf-8"))]


def rows_of_all(of_ranks: list[list[RecipeRow]], **known: Any) -> list[RecipeRow]:
    """Times are those of the last rank, which has the loss; memory is the fullest rank's."""
    rows = []
    for same in zip(*of_ranks, strict=True):
        memory = {
            name: max((getattr(row, name) for row in same if getattr(row, name)), default=None)
            for name in ("peak_mib", "held_gib")
        }
        rows.append(replace(same[-1], **known, **memory))
    return rows


def recipe_tables(rows: list[RecipeRow]) -> list[Table | str]:
    """The training in words, its losses, the parts of their steps, and what was left out."""
    timed = [row for row in rows if row.rounds]
    return [_words(rows[0]), _losses(timed), _parts(timed), *_left_out(rows)]


def _words(row: RecipeRow) -> str:
    size = f"{row.parameters:,} parameters" if row.parameters else f"{row.layers} layers"
    held = f", {row.held_gib:.1f} GiB held on a GPU" if row.held_gib else ""
    return (
        f"{row.recipe}: {size}, {row.precision}, {row.layout}, {row.tokens:,} tokens a step in "
        f"micro-batches of {row.micro_batch_tokens:,}{held}"
    )


def _losses(rows: list[RecipeRow]) -> Table:
    heads = ["loss", "by", "ms a step (p20-p80)", "ms more than the first (95 %)", "% more"]
    heads += ["tokens/s", "TFLOP/s", "% of peak", "peak MiB"]
    table = table_of(f"training steps, {rows[0].rounds} rounds", heads)
    for row in rows:
        cells = [row.loss, row.by, with_range(row.median_ms, row.p20_ms, row.p80_ms)]
        cells += [*_more(row, rows[0]), number(row.tokens_per_s), f"{row.tflops:.3g}"]
        cells += [_percent(row.tflops, row.peak_tflops), number(row.peak_mib)]
        table.add_row(*cells)
    return table


def _more(row: RecipeRow, first: RecipeRow) -> tuple[str, str]:
    """(paired difference and its interval, its share of the first loss's step), signed."""
    middle, low, high = row.minus_first_ms, row.minus_first_low_ms, row.minus_first_high_ms
    if middle is None or low is None or high is None or not first.median_ms:
        return "", ""
    share = 100 * middle / first.median_ms
    return f"{middle:+.2f} ({low:+.2f} to {high:+.2f})", f"{share:+.2f}"


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


def main() -> None:
    """Measure on this rank."""
    folder, rounds, names = Path(sys.argv.pop(1)), int(sys.argv.pop(1)), sys.argv.pop(1)
    orphans.leave_none()
    cpu.install()  # before megatron is imported; does nothing where there is a GPU

    from megatron_infoentropy.integration.compat import prepare_megatron

    prepare_megatron()
    from megatron_infoentropy.bench.recipe_losses import measure

    measure(folder, rounds, json.loads(names))


if __name__ == "__main__":
    main()
