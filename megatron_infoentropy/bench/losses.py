"""Rows of the losses: forward, backward and both of every provider, and how often it takes ours."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

from megatron_infoentropy.bench.collectives import Traffic
from megatron_infoentropy.bench.experiment import Experiment
from megatron_infoentropy.bench.passes import ratio, spread, time_in_turn
from megatron_infoentropy.bench.peers import peers
from megatron_infoentropy.bench.providers import (
    Loss,
    Provider,
    Unavailable,
    best_backend,
    in_place,
    ours,
)
from megatron_infoentropy.bench.rehearsal import Rehearsed, rehearse
from megatron_infoentropy.bench.results import Row
from megatron_infoentropy.bench.truth import Truth
from megatron_infoentropy.progress import Advance, progress

# step -> (logits read or written, in words): what the problem needs, whoever solves it
MOVES = {
    "forward": (1, "1 read"),
    "backward": (2, "1 read, 1 write"),
    "both": (3, "2 reads, 1 write"),
}
GRADIENT_IN_FORWARD = {"forward": MOVES["both"], "backward": (0, ""), "both": MOVES["both"]}

Times = dict[str, dict[str, list[float]]]  # {provider: {step: [repeat] ms}}


def measure_losses(experiment: Experiment) -> list[Row]:
    """Rows of every provider: three of one that runs, one with a reason of one that does not."""
    every = ours(experiment.setting) + peers()
    turns = (experiment.repeats + 1) * len(every)
    with _progress_of_first_rank(experiment, turns) as advance:
        rehearsed, refused = _rehearse_all(every, experiment, advance)
        passes = {one.provider.name: partial(_one_pass, one.loss, experiment) for one in rehearsed}
        measured = time_in_turn(passes, experiment, advance)
    times = {name: _by_step(values) for name, values in measured.items()}
    rows = [row for one in rehearsed for row in _rows(one, times, experiment)]
    return rows + [_unavailable(provider, why, experiment) for provider, why in refused]


@contextmanager
def _progress_of_first_rank(experiment: Experiment, turns: int) -> Iterator[Advance]:
    if experiment.setting.group.rank() > 0:
        yield lambda work: None
        return
    with progress(str(experiment.setting.case), turns, "passes") as advance:
        yield advance


def _rehearse_all(
    every: list[Provider], experiment: Experiment, advance: Advance
) -> tuple[list[Rehearsed], list[tuple[Provider, str]]]:
    truth = Truth(experiment.logits, experiment.target, experiment.setting.group)
    rehearsed, refused = [], []
    for provider in every:
        try:
            rehearsed.append(rehearse(provider, experiment, truth))
        except Unavailable as error:
            refused.append((provider, str(error)))
            advance(experiment.repeats)  # the turns it will not take
        advance(1)
    return rehearsed, refused


def _one_pass(loss: Loss, experiment: Experiment) -> Iterator[None]:
    leaf = experiment.logits.clone().requires_grad_()  # some providers overwrite what they get
    yield
    value = loss(leaf, experiment.target)
    yield
    value.backward()  # type: ignore[no-untyped-call]
    yield


def _by_step(values: list[list[float]]) -> dict[str, list[float]]:
    forward, backward = ([repeat[step] for repeat in values] for step in (0, 1))
    return {"forward": forward, "backward": backward, "both": [sum(repeat) for repeat in values]}


def _rows(one: Rehearsed, times: Times, experiment: Experiment) -> Iterator[Row]:
    provider = one.provider
    moves = GRADIENT_IN_FORWARD if provider.gradient_in_forward else MOVES
    for step, values in times[provider.name].items():
        taken, (moved, words) = spread(values), moves[step]
        yield experiment.row(
            kind="loss",
            step=step,
            **_names(provider),
            repeats=len(values),
            median_ms=taken.median,
            p20_ms=taken.p20,
            p80_ms=taken.p80,
            **_ratios(values, step, times, experiment),
            bytes=moved * experiment.logits_bytes or None,
            bytes_are=words,
            gb_per_s=moved * experiment.logits_bytes / taken.median / 1e6 or None,
            **(_whole_pass(one) if step == "both" else {}),
            **_traffic(one, step),
        )


def _names(provider: Provider) -> dict[str, str]:
    by = "ours" if provider.is_ours else "peer"
    return {"provider": provider.name, "by": by, "computes": provider.computes}


def _ratios(
    values: list[float], step: str, times: Times, experiment: Experiment
) -> dict[str, float]:
    """How many times as long as the best of ours, into new memory and over the logits."""
    columns: dict[str, float] = {}
    ours_best = best_backend(experiment.setting)
    for column, name in (("times_ours", ours_best), ("times_in_place", in_place(ours_best))):
        if name in times:
            times_as_long = ratio(values, times[name][step])
            columns[column] = times_as_long.median
            columns[f"{column}_p20"] = times_as_long.p20
            columns[f"{column}_p80"] = times_as_long.p80
    return columns


def _whole_pass(one: Rehearsed) -> dict[str, float]:
    return {
        "peak_mib": one.peak_mib,
        "loss_error": one.errors.loss,
        "gradient_error": one.errors.gradient,
    }


def _traffic(one: Rehearsed, step: str) -> dict[str, int]:
    if one.traffic is None:
        return {}
    forward, backward = one.traffic
    both = Traffic(forward.collectives + backward.collectives, forward.bytes + backward.bytes)
    counted = {"forward": forward, "backward": backward, "both": both}[step]
    return {"collectives": counted.collectives, "collective_bytes": counted.bytes}


def _unavailable(provider: Provider, reason: str, experiment: Experiment) -> Row:
    return experiment.row(kind="unavailable", step="", reason=reason, **_names(provider))
