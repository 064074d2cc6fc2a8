"""The targets that were set before measuring, and what a result file says of each."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

from megatron_infoentropy.bench.cases import HEADLINE
from megatron_infoentropy.bench.results import Row
from megatron_infoentropy.bench.table import number


class Target(NamedTuple):
    """A bound on one number of the rows at a case; `measure` gives None where it is not there."""

    words: str
    measure: Callable[["Rows"], float | None]
    bound: float
    at_least: bool


class Rows:
    """The rows of one case, by provider and step."""

    def __init__(self, rows: list[Row]) -> None:
        timed = [row for row in rows if row.median_ms is not None]
        self.found = {(row.provider, row.step): row for row in timed}
        ours = [row for row in timed if row.by == "ours" and row.step == "both"]
        self.ours = next((row for row in ours if row.times_in_place == 1), None)  # in place, best

    def times(self, provider: str) -> float | None:
        row = self.found.get((provider, "both"))
        return row.times_in_place if row else None

    def share(self, step: str) -> float | None:
        """Percent of its limit, of the backend that ours in place uses."""
        backend = self.ours.provider.removesuffix(" in place") if self.ours else ""
        row = self.found.get((backend, step))
        return row.percent_of_limit if row else None

    def entropy_cost(self) -> float | None:
        """Percent over the same without the entropy."""
        times = self.times(f"{self.ours.provider} (cross entropy)") if self.ours else None
        return 100 / times - 100 if times else None

    def peak(self) -> float | None:
        """In sizes of the logits, those included."""
        if self.ours is None or self.ours.peak_mib is None or not self.ours.bytes:
            return None
        return 1 + self.ours.peak_mib / (self.ours.bytes / 3 / 2**20)

    def fused_linear_ms(self) -> float | None:
        found = [
            r.median_ms for (name, _), r in self.found.items() if name.startswith("fused loss")
        ]
        return found[0] if found else None


def _share(step: str) -> Callable[[Rows], float | None]:
    return lambda rows: rows.share(step)


def _times(provider: str) -> Callable[[Rows], float | None]:
    return lambda rows: rows.times(provider)


GPU = [
    Target("statistics, % of the copy bandwidth", _share("statistics"), 88, True),
    Target("gradient, % of the copy bandwidth", _share("gradient"), 90, True),
    Target("Megatron unfused, times ours", _times("megatron unfused"), 7.5, True),
    Target("Liger vocab-parallel, times ours", _times("liger vocab-parallel"), 3, True),
    Target("Transformer Engine, times ours", _times("transformer engine"), 0.97, True),
    Target(
        "Transformer Engine in place, times ours", _times("transformer engine in place"), 0.97, True
    ),
    Target("entropy, % over our plain cross entropy", Rows.entropy_cost, 3, False),
    Target("peak memory, times the logits", Rows.peak, 1.01, False),
    Target("fused linear, hidden size 4096, ms", Rows.fused_linear_ms, 37, False),
]
CPU = [
    Target("statistics, % of what bounds them", _share("statistics"), 80, True),
    Target("gradient, % of what bounds it", _share("gradient"), 80, True),
    Target("paper eager, times ours", _times("paper eager"), 20, True),
    Target("torch, times ours", _times("torch"), 8, True),
]


def lines(rows: list[Row]) -> Iterator[list[str]]:
    """Cells (target, measured, met) of the targets that the file's first case belongs to."""
    first = rows[0]
    shape = (first.tokens, first.vocabulary)
    if shape == HEADLINE and first.dtype == "bfloat16":
        targets = GPU
    elif shape == (2048, 32000) and first.dtype == "float32" and first.clock == "wall time":
        targets = CPU
    else:
        return
    of_case = Rows([row for row in rows if row.case == first.case])
    for target in targets:
        value = target.measure(of_case)
        bound = f"{target.words}: {'>=' if target.at_least else '<='} {target.bound:g}"
        if value is None:
            yield [bound, "", "not measured"]
        else:
            met = value >= target.bound if target.at_least else value <= target.bound
            yield [
                bound,
                number(value) if value >= 0 else f"{value:.2f}",
                "yes" if met else "**no**",
            ]
