"""Settings compared: the evaluations of one against those of another, with what is uncertain.

Runs form groups that share objective and set-up (size, steps, batch, sequence) and differ in the
seed. A group is compared with a baseline:

    paired      over the seeds that both have, if at least two, or one and no more on both sides
    unpaired    over all seeds of both, if they share fewer than two and have at least two each
    documents   otherwise one pair, which says nothing about other seeds

Several differences are read at once, so their p-values are adjusted by Holm's rule, in families
that each answer one question: over all tokens (one per group), by frequency bucket, by decile, by
difficulty, by domain (each over all groups). A difference is called shown where its adjusted
p-value is below 5 % and seeds were part of it; with one seed each, nothing is called shown.
"""

from dataclasses import dataclass, replace
from typing import Literal

from megatron_infoentropy.config import COMMON, InfoEntropyConfig
from megatron_infoentropy.evaluate.errors import DifferentDataError
from megatron_infoentropy.evaluate.evaluation import Evaluation
from megatron_infoentropy.evaluate.inference import (
    CONFIDENCE,
    Estimate,
    estimate_differences,
    holm,
)
from megatron_infoentropy.evaluate.runs import Run
from megatron_infoentropy.evaluate.statistics import (
    Kind,
    Place,
    require_same_tokens,
    seed_noise,
    statistics,
    way_of_scoring,
)

Reading = Literal["better", "worse", "no difference shown", "seed noise unknown"]


@dataclass(frozen=True)
class Group:
    """Runs with one objective and set-up, one per seed; `repeated` are left out of comparisons."""

    label: str
    is_baseline: bool
    runs: list[Run]
    repeated: list[Run]

    @property
    def evaluated(self) -> list[Run]:
        return [run for run in self.runs if run.evaluation is not None]


@dataclass(frozen=True)
class Row:
    """One statistic of two groups, in nats per token; means over the seeds compared.

    `difference` is group minus baseline. `low` and `high` bound its 95 % interval, over documents
    and, where there are several, over seeds; `p` belongs to it and `p_adjusted` to its family of
    `tests`; `detectable` is the smallest true difference that the adjusted test would show in 80
    of 100 repetitions. They are None where there are too few documents. `seed_noise` is the largest
    gap between two runs of one objective that differ only in the seed, None where unknown.
    """

    kind: Kind
    name: str
    baseline: float
    group: float
    difference: float
    low: float | None
    high: float | None
    documents: int
    seed_noise: float | None
    reading: Reading
    standard_error: float | None
    p: float | None
    p_adjusted: float | None
    tests: int
    detectable: float | None


@dataclass(frozen=True)
class Comparison:
    """A group against its baseline, or the reason why not (`refusal`, then without rows)."""

    group: str
    baseline: str
    seeds: list[int]  # that were compared, of either side
    noise_seeds: dict[str, list[int]]  # seeds of each label that the noise was taken from
    rows: list[Row]
    refusal: str | None = None
    paired: bool = True


def group_runs(runs: list[Run]) -> list[Group]:
    """Sort runs into groups, cross entropy first, otherwise in the order given."""
    groups: dict[tuple[object, ...], list[Run]] = {}
    for run in runs:
        groups.setdefault((run.objective_label, run.setup), []).append(run)
    several_setups = len({run.setup for run in runs}) > 1
    result = []
    for (label, _), members in groups.items():
        by_seed = {run.seed: run for run in reversed(members)}
        first = [run for run in members if by_seed[run.seed] is run]
        repeated = [run for run in members if by_seed[run.seed] is not run]
        name = f"{label} ({_setup_in_words(members[0])})" if several_setups else str(label)
        result.append(Group(name, members[0].is_baseline, first, repeated))
    return sorted(result, key=lambda group: not group.is_baseline)


def compare_groups(groups: list[Group]) -> list[Comparison]:
    """Compare every evaluated group with the cross-entropy group of its set-up."""
    pairs: list[tuple[Group, Group | None]] = []
    for group in groups:
        if group.is_baseline or not group.evaluated:
            continue
        setup = group.runs[0].setup
        baselines = [g for g in groups if g.is_baseline and g.runs[0].setup == setup]
        pairs.append((group, baselines[0] if baselines else None))
    return compare_pairs(pairs)


def compare_pairs(
    pairs: list[tuple[Group, Group | None]], references: list[Evaluation] | None = None
) -> list[Comparison]:
    """Compare each group with its baseline; one correction over all of them.

    references: whose mean entropy makes tokens easy or hard; default: of all runs compared.
    """
    if references is None:  # all, so that "hard" is the same tokens in every row of a family
        groups = {id(group): group for pair in pairs for group in pair if group is not None}
        every = [run.evaluation for group in groups.values() for run in group.evaluated]
        references = [evaluation for evaluation in every if evaluation is not None]
        made = [_compare(*pair, _scored_alike(pair[0], references)) for pair in pairs]
    else:
        made = [_compare(*pair, references) for pair in pairs]
    rows = _rows([drafts for _, drafts in made])
    return [replace(made[0], rows=own) for made, own in zip(made, rows, strict=True)]


@dataclass(frozen=True)
class _Draft:
    """A row whose p-value has not been adjusted yet."""

    place: Place
    estimate: Estimate
    baseline: float
    group: float
    seed_noise: float | None
    several_seeds: bool


def _compare(
    group: Group, baseline: Group | None, references: list[Evaluation]
) -> tuple[Comparison, list[_Draft]]:
    if baseline is None:
        reason = "there is no cross-entropy run of the same size, steps, batch and sequence length"
        return Comparison(group.label, "", [], {}, [], reason), []
    first = {run.seed: run.evaluation for run in group.evaluated if run.evaluation}
    second = {run.seed: run.evaluation for run in baseline.evaluated if run.evaluation}
    ours, theirs, paired = _seeds(sorted(first), sorted(second))
    refusal = None if ours else "no seed was trained and evaluated with both objectives"
    every = [*first.values(), *second.values()]
    try:
        require_same_tokens([*every, *references])
    except DifferentDataError as error:
        refusal = str(error)
    if refusal:
        return Comparison(group.label, baseline.label, ours, {}, [], refusal), []
    noisy = [g for g in (baseline, group) if len(g.evaluated) > 1]
    noise_seeds = {g.label: sorted(run.seed for run in g.evaluated) for g in noisy}
    compared = [first[seed] for seed in ours] + [second[seed] for seed in theirs]
    places, sums = statistics(compared, references)
    sides = list(range(len(ours))), list(range(len(ours), len(compared)))
    estimates = estimate_differences(sums, *sides, paired=paired)
    same = [[e for r in g.evaluated if (e := r.evaluation)] for g in noisy]
    noise = seed_noise(same, references)
    nats = [sums.nats()[side].mean(axis=0) for side in sides]
    several = min(len(ours), len(theirs)) > 1
    drafts = [
        _Draft(place, found, float(nats[1][c]), float(nats[0][c]), noise.get(place), several)
        for c, (place, found) in enumerate(zip(places, estimates, strict=True))
        if found.difference is not None
    ]
    seeds = sorted({*ours, *theirs})
    return Comparison(group.label, baseline.label, seeds, noise_seeds, [], None, paired), drafts


def _scored_alike(group: Group, evaluations: list[Evaluation]) -> list[Evaluation]:
    """Those that can guide the group's comparison: a page may show models scored otherwise too."""
    own = {way_of_scoring(run.evaluation) for run in group.evaluated if run.evaluation}
    return [e for e in evaluations if way_of_scoring(e) in own and e.token_scores is not None]


def _rows(drafts: list[list[_Draft]]) -> list[list[Row]]:
    """Rows of every comparison, p-values adjusted over all of one kind."""
    families: dict[Kind, list[_Draft]] = {}
    for draft in (draft for own in drafts for draft in own):
        families.setdefault(draft.place[0], []).append(draft)
    finished: dict[int, Row] = {}
    for family in families.values():
        adjusted = holm([draft.estimate.p for draft in family])
        tests = sum(p is not None for p in adjusted)
        for draft, p in zip(family, adjusted, strict=True):
            finished[id(draft)] = _finished(draft, p, max(tests, 1))
    return [[finished[id(draft)] for draft in own] for own in drafts]


def _seeds(first: list[int], second: list[int]) -> tuple[list[int], list[int], bool]:
    """The seeds that are compared of each side, and whether they are pairs."""
    common = [seed for seed in first if seed in second]
    if len(common) < 2 <= min(len(first), len(second)):
        return first, second, False
    return common, common, True


def _finished(draft: _Draft, adjusted: float | None, tests: int) -> Row:
    estimate = draft.estimate
    assert estimate.difference is not None
    reading: Reading = "no difference shown"
    if adjusted is not None and adjusted < 1 - CONFIDENCE:
        better: Reading = "better" if estimate.difference < 0 else "worse"
        reading = better if draft.several_seeds else "seed noise unknown"
    return Row(
        kind=draft.place[0],
        name=draft.place[1],
        baseline=draft.baseline,
        group=draft.group,
        difference=estimate.difference,
        low=estimate.low,
        high=estimate.high,
        documents=estimate.documents,
        seed_noise=draft.seed_noise,
        reading=reading,
        standard_error=estimate.standard_error,
        p=estimate.p,
        p_adjusted=adjusted,
        tests=tests,
        detectable=estimate.detectable(tests),
    )


def _setup_in_words(run: Run) -> str:
    setup, plain = dict(run.setup), InfoEntropyConfig()
    words = [f"{setup['parameters']:,} parameters"]
    words.append(
        f"{setup['train_iters']:,} steps of {setup['global_batch_size']} x {setup['seq_length']}"
    )
    words += [f"{name} {setup[name]:g}" for name in COMMON if setup[name] != getattr(plain, name)]
    return ", ".join(words)
