"""Takes turns between losses, a training step each, and times the parts of every step.

A step goes from its first micro-batch's forward pass to that of the next step: the optimizer, the
log line and the fetching of data are in it. Its parts begin where Megatron calls us. A loss that is
fused with the output layer has no moments of its own; all of it counts as forward.
"""

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from megatron_infoentropy.bench.clock import Clock
from megatron_infoentropy.bench.memory import PeakMeter
from megatron_infoentropy.bench.parts import PartTimes

if TYPE_CHECKING:  # it imports Megatron
    from megatron_infoentropy.bench.recipe_losses import Contender

WARM_UPS = 2  # of every loss: the first builds the optimizer's state, the second finds it there


@dataclass
class Measured:
    """What was seen of one loss on this rank."""

    times: list[float] = field(default_factory=list)  # ms of a step, a round each
    parts: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    peak_mib: float = 0.0  # the worst step's, beside what lives between steps


@dataclass(frozen=True)
class Turn:
    """One training step: whose it is and what it is for."""

    contender: "Contender"
    purpose: str  # "warm up", "weigh" or "time"


def turns(contenders: list["Contender"], rounds: int) -> list[Turn]:
    """Every loss warmed up and weighed, then rounds in which each takes a step, in an order that
    turns from round to round."""
    planned = [Turn(each, "warm up") for each in contenders for _ in range(WARM_UPS)]
    planned += [Turn(each, "weigh") for each in contenders]
    for number in range(rounds):
        first = number % len(contenders)
        planned += [Turn(each, "time") for each in contenders[first:] + contenders[:first]]
    return planned


class TurnTakingStep:
    """Megatron's forward step and `finalize_model_grads_func` of a training that is measured."""

    def __init__(
        self,
        planned: list[Turn],
        clock: Clock,
        meter: PeakMeter,
        iteration: Callable[[], int],
        finish: Callable[[dict[str, Measured]], None],
    ) -> None:
        """iteration: number of the step under way; finish: takes the results after every round, so
        that a training that is stopped early leaves those it has. The last is known in one step
        more."""
        self.measured = {turn.contender.name: Measured() for turn in planned}
        self._planned = planned
        self._times = PartTimes(clock)
        self._meter = meter
        self._iteration = iteration
        self._finish = finish
        self._turn = -1
        self._at: int | None = None

    def __call__(self, data_iterator: Any, model: Any, *arguments: Any, **options: Any) -> Any:
        if self._iteration() != self._at:
            self._next_turn()
        self._watch(model)
        self._times.enter("forward")
        return self._contender.forward_step(data_iterator, model, *arguments, **options)

    def finalize_model_grads(self, *arguments: Any, **options: Any) -> None:
        self._times.enter("gradients")
        self._contender.finalize(*arguments, **options)
        self._times.enter("optimizer")

    @property
    def _contender(self) -> "Contender":
        return self._planned[min(self._turn, len(self._planned) - 1)].contender

    def _next_turn(self) -> None:
        if self._at is not None and self._turn < len(self._planned):
            self._close(self._planned[self._turn])
        self._at = self._iteration()
        self._turn += 1
        if self._turn < len(self._planned) and self._planned[self._turn].purpose == "weigh":
            self._meter.start()
        self._times.start()

    def _close(self, turn: Turn) -> None:
        spent = self._times.stop()
        measured = self.measured[turn.contender.name]
        if turn.purpose == "weigh":
            measured.peak_mib = self._meter.stop()
        if turn.purpose == "time":
            measured.times.append(sum(spent.values()))
            for part, span in spent.items():
                measured.parts[part].append(span)
            if len({len(each.times) for each in self.measured.values()}) == 1:
                self._finish(self.measured)

    def _watch(self, model: Any) -> None:
        """Learn of a pipeline chunk's logits and of their gradient."""
        while hasattr(model, "module"):  # wrappers for data parallelism and 16-bit floats
            model = model.module
        output_layer = getattr(model, "output_layer", None)
        if output_layer is not None:
            self._times.watch(output_layer)
