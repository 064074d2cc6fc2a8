"""On every rank of a training that `infoentropy bench-recipe` measures: its losses take turns, ours
as the recipe says, ours otherwise, and Megatron's.

Each takes a training step at a time, and the parts of every step are timed, by a clock that is
marked where one part gives way to the next (on a GPU by CUDA events among the kernels: a part is
what the device did between two of them, its idling for the host included):

    forward     a micro-batch's forward pass begins
    loss        the output layer has given the logits
    backward    their gradient is complete
    gradients   they are reduced over ranks, and reported on
    optimizer   what is left: the optimizer, the log line, the fetching of data

A step goes from its first micro-batch's forward pass to that of the next step. A loss that is fused
with the output layer has no moments of its own; all of it counts as forward.
"""

import json
import os
from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from megatron.core.distributed import finalize_model_grads
from megatron.core.models.common.language_module import language_module
from megatron.core.utils import get_attr_wrapped_model
from megatron.training import get_args
from megatron.training.training import num_floating_point_operations

from megatron_infoentropy.bench.recipe_run import FUSIONS, PARTS, RecipeRow, own_losses
from megatron_infoentropy.bench.timing import Clock, PeakMeter, median_difference, spread
from megatron_infoentropy.files import write_whole
from megatron_infoentropy.integration.arguments import check_megatron_args
from megatron_infoentropy.integration.batch import get_batch
from megatron_infoentropy.integration.observe import peak_tflops
from megatron_infoentropy.integration.step import (
    InfoEntropyForwardStep,
    LossResult,
    reject_bad_loss,
)
from megatron_infoentropy.pretrain import prepare, run
from megatron_infoentropy.runtime import cpu
from megatron_infoentropy.runtime.device import find_device

WARM_UPS = 2  # of every loss: the first builds the optimizer's state, the second finds it there


def measure(folder: Path, rounds: int, names: list[str]) -> None:
    """Train for as many steps as are to be measured, and one in which the results are written.

    The command line is the training's. After every round rank-N.json in the folder is written anew.
    """
    container, ours = prepare()
    transformer = container.model.transformer
    asked = choose(names, recipe_losses(ours, transformer.finalize_model_grads_func))
    planned = turns([loss for loss in asked if not loss.reason], rounds)
    args = get_args()
    # The learning rate stays that of the recipe's first steps.
    args.lr_decay_iters = args.lr_decay_iters or args.train_iters
    args.train_iters = len(planned) + 1
    path = folder / f"rank-{os.environ.get('RANK', '0')}.json"

    def write(measured: dict[str, "Measured"]) -> None:
        args = get_args()
        flops = num_floating_point_operations(args, 1) / args.seq_length / args.world_size
        rows = rows_of(asked, measured, _facts(args), flops)
        write_whole(path, json.dumps([asdict(row) for row in rows]))

    device = torch.device(find_device().type)
    clock, meter = Clock(device, flush=False), PeakMeter(device)
    step = TurnTakingStep(planned, clock, meter, lambda: int(get_args().curr_iteration), write)
    transformer.finalize_model_grads_func = step.finalize_model_grads
    run(container, step)


def _facts(args: Any) -> dict[str, Any]:
    layout = (
        f"tensor {args.tensor_model_parallel_size}",
        f"pipeline {args.pipeline_model_parallel_size}",
        f"data {args.data_parallel_size}",
    )
    is_gpu = find_device().type == "cuda"
    return {
        "layers": args.num_layers,
        "hidden_size": args.hidden_size,
        "vocabulary": args.padded_vocab_size,
        "precision": _precision(args),
        "layout": " x ".join(layout),
        "ranks": args.world_size,
        "tokens": args.global_batch_size * args.seq_length,
        "micro_batch_tokens": args.micro_batch_size * args.seq_length,
        "peak_tflops": peak_tflops(),
        # The most that PyTorch's allocator took of a GPU, what it caches included.
        "held_gib": torch.cuda.max_memory_reserved() / 2**30 if is_gpu else None,
    }


def _precision(args: Any) -> str:
    name = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
    words: str = name[args.params_dtype]
    return f"FP8 {args.fp8} {args.fp8_recipe}, else {words}" if args.fp8 else words


class RecipeLoss(NamedTuple):
    """One loss of the training, or one that cannot take part and why."""

    name: str
    by: str  # "ours" or "peer"
    forward_step: Callable[..., Any]
    finalize: Callable[..., None]
    calls_output_layer: bool = True
    reason: str = ""


def recipe_losses(ours: InfoEntropyForwardStep, finalize: Callable[..., None]) -> list[RecipeLoss]:
    """Return every loss, first the recipe's own.

    finalize: of the recipe's own training, its reports included.
    """
    losses = []
    for name, config in own_losses(ours.config).items():
        own = InfoEntropyForwardStep(config, ours.vocab_size, ours.batch_weight, ours.observer)
        reason = ""
        try:
            check_megatron_args(get_args(), config)
        except ValueError as error:
            reason = str(error)
        losses.append(RecipeLoss(name, "ours", own, finalize, not config.fused_linear, reason))
    for name, fusion in FUSIONS.items():
        theirs = MegatronForwardStep(*fusion)
        losses.append(
            RecipeLoss(name, "peer", theirs, finalize_model_grads, reason=_why_not(*fusion))
        )
    return losses


def choose(names: list[str], every: list[RecipeLoss]) -> list[RecipeLoss]:
    """Return the losses of these names, all of them where there are none.

    Raises:
        ValueError: not one of them can be measured here.
    """
    chosen = [each for each in every if not names or each.name in names]
    if all(each.reason for each in chosen):
        why = "; ".join(f"{each.name}: {each.reason}" for each in chosen)
        raise ValueError(f"no loss that was asked for can be measured here: {why}")
    return chosen


def _why_not(fused: bool, implementation: str) -> str:
    if implementation == "te" and language_module.te_parallel_cross_entropy is None:
        return "Transformer Engine is not installed"
    if fused and cpu.is_installed():
        return "torch.compile is off where Megatron runs on a CPU"
    return ""


class MegatronForwardStep:
    """Plain cross entropy by the model's own loss, as Megatron's pretrain_gpt.py takes it."""

    def __init__(self, fused: bool, implementation: str) -> None:
        self.fused = fused
        self.implementation = implementation

    def __call__(
        self, data_iterator: Any, model: Any, return_schedule_plan: bool = False
    ) -> tuple[Any, Callable[[torch.Tensor], LossResult]]:
        config = get_attr_wrapped_model(model, "config")
        config.cross_entropy_loss_fusion = self.fused
        config.cross_entropy_fusion_impl = self.implementation
        vp_stage = get_attr_wrapped_model(model, "vp_stage")
        batch = get_batch(data_iterator, vp_stage, config, training=model.training)
        forward = model.build_schedule_plan if return_schedule_plan else model
        output = forward(
            batch["tokens"],
            batch["position_ids"],
            batch["attention_mask"],
            labels=batch["labels"],
            loss_mask=batch["loss_mask"],
        )
        return output, partial(_summed, batch["loss_mask"])


def _summed(loss_mask: torch.Tensor, losses: torch.Tensor) -> LossResult:
    """(sum of the tokens' cross entropies, their count, report)."""
    loss = (losses.float() * loss_mask).sum()
    count = loss_mask.sum()
    reject_bad_loss(loss)
    return loss, count.to(torch.int), {"lm loss": torch.stack([loss.detach(), count])}


@dataclass
class Measured:
    """The times and memory of one loss on this rank."""

    times: list[float] = field(default_factory=list)  # ms of a step, a round each
    parts: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    peak_mib: float = 0.0  # the worst step's, beside what lives between steps


def rows_of(
    asked: list[RecipeLoss],
    measured: dict[str, Measured],
    facts: dict[str, Any],
    flops_per_token: float,
) -> list[RecipeRow]:
    """Return this rank's rows, which lack what its starter knows.

    flops_per_token: of this rank.
    """
    first = next(iter(measured.values()))
    rows = []
    for loss in asked:
        columns: dict[str, Any] = {"reason": loss.reason}
        if not loss.reason:
            seen = measured[loss.name]
            columns = _columns(seen, first)
            rate = columns["tokens_per_s"] = facts["tokens"] / columns["median_ms"] * 1e3
            columns["tflops"] = rate * flops_per_token / 1e12
            # Where output layer and loss are one there is no moment between them.
            for part in PARTS if loss.calls_output_layer else ():
                columns[f"{part}_ms"] = spread(seen.parts[part]).median
        rows.append(RecipeRow("", None, **facts, loss=loss.name, by=loss.by, **columns))
    return rows


def _columns(seen: Measured, first: Measured) -> dict[str, Any]:
    """Times of a loss, and beside the first one's."""
    columns = {"rounds": len(seen.times), "peak_mib": seen.peak_mib, **spread(seen.times).columns()}
    if seen is first:
        return columns
    names = ("minus_first_low_ms", "minus_first_ms", "minus_first_high_ms")
    return columns | dict(zip(names, median_difference(seen.times, first.times), strict=True))


class Turn(NamedTuple):
    """One training step: whose it is and what it is for."""

    loss: RecipeLoss
    purpose: str  # "warm up", "weigh" or "time"


def turns(losses: list[RecipeLoss], rounds: int) -> list[Turn]:
    """Every loss warmed up and weighed, then rounds in which each takes a step, in an order that
    turns from round to round."""
    planned = [Turn(each, "warm up") for each in losses for _ in range(WARM_UPS)]
    planned += [Turn(each, "weigh") for each in losses]
    for number in range(rounds):
        first = number % len(losses)
        planned += [Turn(each, "time") for each in losses[first:] + losses[:first]]
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
        self.measured = {turn.loss.name: Measured() for turn in planned}
        self._planned = planned
        self._clock = clock
        self._meter = meter
        self._iteration = iteration
        self._finish = finish
        self._turn = -1
        self._at: int | None = None
        self._begun: list[str] = []  # parts of this step, in their order
        self._watched: set[Any] = set()

    def __call__(self, data_iterator: Any, model: Any, *arguments: Any, **options: Any) -> Any:
        if self._iteration() != self._at:
            self._next_turn()
        self._watch(model)
        self._enter("forward")
        return self._loss.forward_step(data_iterator, model, *arguments, **options)

    def finalize_model_grads(self, *arguments: Any, **options: Any) -> None:
        self._enter("gradients")
        self._loss.finalize(*arguments, **options)
        self._enter("optimizer")

    @property
    def _loss(self) -> RecipeLoss:
        return self._planned[min(self._turn, len(self._planned) - 1)].loss

    def _next_turn(self) -> None:
        if self._at is not None and self._turn < len(self._planned):
            self._close(self._planned[self._turn])
        self._at = self._iteration()
        self._turn += 1
        if self._turn < len(self._planned) and self._planned[self._turn].purpose == "weigh":
            self._meter.start()
        self._begun = [PARTS[0]]
        self._clock.start()

    def _enter(self, part: str) -> None:
        """A part begins, unless it is under way."""
        if part != self._begun[-1]:
            self._clock.mark()
            self._begun.append(part)

    def _close(self, turn: Turn) -> None:
        self._clock.mark()
        spans = self._clock.read()
        measured = self.measured[turn.loss.name]
        if turn.purpose == "weigh":
            measured.peak_mib = self._meter.stop()
        if turn.purpose == "time":
            measured.times.append(sum(spans))
            begun = list(zip(self._begun, spans, strict=True))
            for part in PARTS:  # 0 of those that the step did not pass through
                measured.parts[part].append(sum(span for name, span in begun if name == part))
            if len({len(each.times) for each in self.measured.values()}) == 1:
                self._finish(self.measured)

    def _watch(self, model: Any) -> None:
        """Learn from a pipeline chunk's output layer where the loss begins and ends."""
        while hasattr(model, "module"):  # wrappers for data parallelism and 16-bit floats
            model = model.module
        output_layer = getattr(model, "output_layer", None)
        if output_layer is not None and output_layer not in self._watched:
            self._watched.add(output_layer)
            output_layer.register_forward_hook(self._logits_are_there)

    def _logits_are_there(self, layer: Any, inputs: Any, output: tuple[torch.Tensor, Any]) -> None:
        if output[0].requires_grad:
            output[0].register_hook(lambda gradient: self._enter("backward"))  # type: ignore[no-untyped-call]
        self._enter("loss")
