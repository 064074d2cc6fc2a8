"""Settings compared: the evaluations of one against those of another, with what is uncertain.

Several differences are read at once, so their p-values are adjusted by Holm's rule, in families
that each answer one question: over all tokens (one per group), by frequency bucket, by decile, by
difficulty, by domain (each over all groups). A difference is called shown where its adjusted
p-value is below 5 % and seeds were part of it; with one seed each, nothing is called shown.
"""

from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Literal

from megatron_infoentropy.evaluate.errors import DifferentDataError
from megatron_infoentropy.evaluate.evaluation import Evaluation
from megatron_infoentropy.evaluate.groups import (
    Group,
    Match,
    Pairing,
    are_identical,
    match,
    one_model_twice,
)
from megatron_infoentropy.evaluate.inference import (
    CONFIDENCE,
    Estimate,
    estimate_differences,
    holm,
)
from megatron_infoentropy.evaluate.statistics import (
    Kind,
    Place,
    require_same_tokens,
    seed_noise,
    statistics,
    way_of_scoring,
)

_NOT_EVALUATED = "no run of it has been evaluated"

Reading = Literal["better", "worse", "no difference shown", "seed noise unknown"]


@dataclass(frozen=True)
class Row:
    """One statistic of two groups, in nats per token; means over the seeds compared.

    `difference` is group minus baseline. `low` and `high` bound its 95 % interval, over documents
    and, where there are several, over seeds; `p` belongs to it and `p_adjusted` to its family of
    `tests`; `detectable` is the smallest true difference that the adjusted test would show in 80
    of 100 repetitions. They are None where there are too few documents, `detectable` also where
    there is one seed: then nothing is called shown. `seed_noise` is the largest gap between two
    runs of one objective that differ only in the seed, None where unknown.
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
    pairing: Pairing = "seed"
    compared: list[list[str]] = field(default_factory=list)  # names of runs, the group's first
    left_out: list[str] = field(default_factory=list)  # evaluated runs: a name and a reason each
    identical: list[list[str]] = field(default_factory=list)  # pairs with the same scores

    @property
    def has_several_seeds(self) -> bool:
        return all(len(names) > 1 for names in self.compared)

    @property
    def is_identical(self) -> bool:
        """Whether there is nothing to compare: all pairs have the same scores."""
        return bool(self.rows) and len(self.identical) == len(self.compared[0])


def compare_groups(groups: list[Group]) -> list[Comparison]:
    """Compare every group with the cross-entropy group of its set-up."""
    pairs: list[tuple[Group, Group | None]] = []
    for group in groups:
        if group.is_baseline:
            continue
        setup = group.runs[0].setup
        baselines = [g for g in groups if g.is_baseline and g.runs[0].setup == setup]
        pairs.append((group, baselines[0] if baselines else None))
    return compare_pairs(pairs)


def compare_pairs(
    pairs: list[tuple[Group, Group | None]], references: list[Evaluation] | None = None
) -> list[Comparison]:
    """Compare each group with its baseline; one correction over all of them.

    references: whose mean entropy makes tokens easy or hard; default: of all settings compared.
    """
    if references is None:  # all, so that "hard" is the same tokens in every row of a family
        groups = {id(group): group for pair in pairs for group in pair if group is not None}
        every = [group.evaluations for group in groups.values()]
        made = [_compare(*pair, _scored_alike(pair[0], every)) for pair in pairs]
    else:
        made = [_compare(*pair, [references]) for pair in pairs]
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
    group: Group, baseline: Group | None, references: list[list[Evaluation]]
) -> tuple[Comparison, list[_Draft]]:
    if baseline is None:
        reason = "there is no cross-entropy run of the same size, steps, batch and sequence length"
        reason = reason if group.evaluated else _NOT_EVALUATED
        return Comparison(group.label, "", [], {}, [], reason), []
    found = match(group, baseline)
    known = group.seeds_known and baseline.seeds_known
    noisy = [g for g in (baseline, group) if len(g.evaluated) > 1]
    made = Comparison(
        group.label,
        baseline.label,
        sorted({run.seed for run in (*found.ours, *found.theirs)}) if known else [],
        {g.label: sorted(run.seed for run in g.evaluated) for g in noisy},
        rows=[],
        refusal=_refusal(group, baseline, found, references),
        pairing=found.pairing,
        compared=[[run.name for run in side] for side in (found.ours, found.theirs)],
        left_out=found.left_out,
    )
    if made.refusal:
        return replace(made, noise_seeds={}), []
    pairs = [] if found.pairing == "unpaired" else zip(found.ours, found.theirs, strict=True)
    identical = [[one.name, other.name] for one, other in pairs if are_identical(one, other)]
    return replace(made, identical=identical), _drafts(found, noisy, references)


def _refusal(
    group: Group, baseline: Group, found: Match, references: list[list[Evaluation]]
) -> str | None:
    """Why two settings cannot be compared, if so."""
    if not group.evaluated:
        return _NOT_EVALUATED
    try:
        require_same_tokens([*group.evaluations, *baseline.evaluations, *chain(*references)])
    except DifferentDataError as error:
        return str(error)
    if twice := one_model_twice(group) or one_model_twice(baseline):
        return twice
    return None if found.ours else "no seed was trained and evaluated with both objectives"


def _drafts(found: Match, noisy: list[Group], references: list[list[Evaluation]]) -> list[_Draft]:
    runs = [*found.ours, *found.theirs]
    compared = [run.evaluation for run in runs if run.evaluation]
    places, sums = statistics(compared, references)
    ours = len(found.ours)
    sides = list(range(ours)), list(range(ours, len(compared)))
    estimates = estimate_differences(sums, *sides, paired=found.pairing != "unpaired")
    noise = seed_noise([group.evaluations for group in noisy], references)
    nats = [sums.nats()[side].mean(axis=0) for side in sides]
    several = min(map(len, sides)) > 1
    return [
        _Draft(place, one, float(nats[1][c]), float(nats[0][c]), noise.get(place), several)
        for c, (place, one) in enumerate(zip(places, estimates, strict=True))
        if one.difference is not None
    ]


def _scored_alike(group: Group, every: list[list[Evaluation]]) -> list[list[Evaluation]]:
    """Those that can guide the group's comparison: a page may show models scored otherwise too."""
    own = {way_of_scoring(evaluation) for evaluation in group.evaluations}
    kept = [
        [e for e in evaluations if way_of_scoring(e) in own and e.token_scores is not None]
        for evaluations in every
    ]
    return [evaluations for evaluations in kept if evaluations]


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
        detectable=estimate.detectable(tests) if draft.several_seeds else None,
    )
