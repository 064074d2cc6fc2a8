"""Settings: runs with one objective and set-up, one per seed, and whom of two to set side by side.

seed      over the seeds that both have, if at least two, or one and no more on both sides
order     evaluations of unknown seeds: the first with the first, if there are as many of both
unpaired  over all of both otherwise, if there are at least two of each
one       otherwise one evaluation of each, which says nothing about other seeds
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import combinations
from typing import Literal

from megatron_infoentropy.config import COMMON
from megatron_infoentropy.evaluate.evaluation import Evaluation
from megatron_infoentropy.evaluate.runs import Run
from megatron_infoentropy.evaluate.wording import plural

Pairing = Literal["seed", "order", "unpaired", "one"]

_SETUP_WORDS = {
    "parameters": "{:,} parameters",
    "train_iters": "{:,} steps",
    "global_batch_size": "batch {}",
    "seq_length": "length {}",
} | {name: name + " {:g}" for name in COMMON}


@dataclass(frozen=True)
class Group:
    """Runs with one objective and set-up, one per seed; `repeated` are left out of comparisons.

    Where `seeds_known` is false the runs are evaluations of models that nothing is known of, and
    count as seeds because they were named as such.
    """

    label: str
    is_baseline: bool
    runs: list[Run]
    repeated: list[Run]
    seeds_known: bool = True
    counted: Literal["evaluated", "asked"] = "evaluated"  # which runs a comparison is made of

    @property
    def evaluated(self) -> list[Run]:
        return [run for run in self.runs if run.evaluation is not None]

    @property
    def compared(self) -> list[Run]:
        """Return the runs that a comparison is made of: evaluated ones, or those asked tasks."""
        return (
            [run for run in self.runs if run.tasks] if self.counted == "asked" else self.evaluated
        )

    @property
    def evaluations(self) -> list[Evaluation]:
        return [run.evaluation for run in self.runs if run.evaluation is not None]


@dataclass(frozen=True)
class Match:
    """The runs of either side that are compared, and why others are not, a clause for each."""

    ours: list[Run]
    theirs: list[Run]
    pairing: Pairing
    left_out: list[str]

    def identical(self, is_same: Callable[[Run, Run], bool]) -> list[list[str]]:
        """Name the pairs whose scores or answers are the same."""
        pairs = zip(self.ours, self.theirs, strict=True) if self.pairing != "unpaired" else ()
        return [[one.name, other.name] for one, other in pairs if is_same(one, other)]


def group_runs(runs: list[Run]) -> list[Group]:
    """Sort runs into groups, cross entropy first, otherwise in the order given.

    A group's label is its objective, and of its set-up what is not the same in all runs.
    """
    groups: dict[tuple[object, ...], list[Run]] = {}
    for run in runs:
        groups.setdefault((run.objective_label, run.setup), []).append(run)
    setups = [dict(run.setup) for run in runs]
    differ = [name for name in _SETUP_WORDS if len({setup[name] for setup in setups}) > 1]
    result = []
    for (label, setup), members in groups.items():
        by_seed = {run.seed: run for run in reversed(members)}
        first = [run for run in members if by_seed[run.seed] is run]
        repeated = [run for run in members if by_seed[run.seed] is not run]
        values = dict(setup)  # type: ignore[call-overload]
        words = [str(label), *(_SETUP_WORDS[name].format(values[name]) for name in differ)]
        result.append(Group(", ".join(words), members[0].is_baseline, first, repeated))
    return sorted(result, key=lambda group: not group.is_baseline)


def match(group: Group, baseline: Group) -> Match:
    """Return which runs of two settings are compared: none without a seed that both have."""
    first, second = group.compared, baseline.compared
    if group.seeds_known and baseline.seeds_known:
        ours, theirs, pairing = _by_seed(first, second)
    elif min(len(first), len(second)) < 2:
        ours, theirs, pairing = first[:1], second[:1], "one"
    elif len(first) == len(second) and not (group.seeds_known or baseline.seeds_known):
        ours, theirs, pairing = first, second, "order"
    else:
        ours, theirs, pairing = first, second, "unpaired"
    left_out = _left_out(group, ours, baseline) + _left_out(baseline, theirs, group)
    return Match(ours, theirs, pairing, left_out)


def one_model_twice(
    runs: list[Run], is_same: Callable[[Run, Run], bool], counted: str
) -> str | None:
    """Name two runs of a setting that are the same model: they say nothing about seeds."""
    for one, other in combinations(runs, 2):
        if is_same(one, other):
            return f"{one.name} and {other.name} are one model {counted} twice, not two seeds"
    return None


def repeats(group: Group) -> list[str]:
    """Name the runs of a group that repeat a seed, a clause for each."""
    first = {run.seed: run.name for run in group.runs}
    return [
        f"{run.name}, as it repeats objective, set-up and seed of {first[run.seed]}"
        for run in group.repeated
    ]


def _by_seed(first: list[Run], second: list[Run]) -> tuple[list[Run], list[Run], Pairing]:
    ours, theirs = ({run.seed: run for run in side} for side in (first, second))
    common = sorted(ours.keys() & theirs.keys())
    if len(common) < 2 <= min(len(ours), len(theirs)):
        sides = ([side[seed] for seed in sorted(side)] for side in (ours, theirs))
        return *sides, "unpaired"  # type: ignore[return-value]
    pairing: Pairing = "seed" if len(common) > 1 else "one"
    return [ours[seed] for seed in common], [theirs[seed] for seed in common], pairing


def _left_out(group: Group, compared: list[Run], other: Group) -> list[str]:
    left = [run for run in group.compared if run not in compared]
    seeds_known = group.seeds_known and other.seeds_known
    reason = f"{other.label} has no {group.counted} run of seed {{}}"
    if not seeds_known:
        reason = f"there is {plural(len(other.compared), 'evaluation')} only of {other.label}"
    return [f"{run.name}, as {reason.format(run.seed)}" for run in left] + repeats(group)
