"""What a measured training left on its ranks, as rows of a result file."""

from dataclasses import dataclass
from typing import Any

from megatron_infoentropy.bench.parts import PARTS
from megatron_infoentropy.bench.passes import spread
from megatron_infoentropy.bench.step_rows import median_difference


@dataclass(frozen=True)
class RankResult:
    """What one rank saw; times in ms, a number a round."""

    contenders: list[dict[str, Any]]  # name, by, calls_output_layer, times, parts, peak_mib
    left_out: list[tuple[str, str]]  # name, reason
    facts: dict[str, Any]


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
    matmul_tflops: float | None = None  # a large matrix product in the training's own type
    forward_ms: float | None = None  # medians; they need not add up to the step's
    loss_ms: float | None = None
    backward_ms: float | None = None
    gradients_ms: float | None = None
    optimizer_ms: float | None = None
    peak_mib: float | None = None  # of the fullest rank's step, beside what lives between steps
    held_gib: float | None = None  # the most that the allocator took of a GPU, over all losses
    reason: str = ""  # why there is no time


def rows_of(recipe: str, parameters: int | None, ranks: list[RankResult]) -> list[RecipeRow]:
    """Times are those of the last rank, which has the loss; memory is the fullest rank's."""
    last = ranks[-1]
    facts = dict(last.facts)
    per_token = facts.pop("flops_per_token")
    held = [rank.facts["held_gib"] for rank in ranks]
    facts["held_gib"] = None if None in held else max(held)
    rates = {name: facts.pop(name) for name in ("peak_tflops", "matmul_tflops", "held_gib")}
    same = {"recipe": recipe, "parameters": parameters, **facts}
    rows = []
    for index, seen in enumerate(last.contenders):
        median, p20, p80 = spread(seen["times"])
        tokens_per_s = facts["tokens"] / median * 1e3
        rows.append(
            RecipeRow(
                **same,
                **rates,
                loss=seen["name"],
                by=seen["by"],
                rounds=len(seen["times"]),
                median_ms=median,
                p20_ms=p20,
                p80_ms=p80,
                tokens_per_s=tokens_per_s,
                tflops=tokens_per_s * per_token / facts["ranks"] / 1e12,
                peak_mib=max(rank.contenders[index]["peak_mib"] for rank in ranks),
                **_differences(seen, last.contenders[0]),  # type: ignore[arg-type]
                **_parts(seen),  # type: ignore[arg-type]
            )
        )
    return rows + [
        RecipeRow(**same, loss=name, by="", reason=reason) for name, reason in last.left_out
    ]


def _differences(seen: dict[str, Any], first: dict[str, Any]) -> dict[str, float]:
    if seen is first:
        return {}
    low, median, high = median_difference(seen["times"], first["times"])
    names = ("minus_first_low_ms", "minus_first_ms", "minus_first_high_ms")
    return dict(zip(names, (low, median, high), strict=True))


def _parts(seen: dict[str, Any]) -> dict[str, float]:
    """Unknown where the output layer and the loss are one: there is no moment between them."""
    if not seen["calls_output_layer"]:
        return {}
    return {f"{part}_ms": spread(seen["parts"][part]).median for part in PARTS}
