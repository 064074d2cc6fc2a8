"""Objectives compared: runs paired by seed, with what documents and seeds leave uncertain.

Runs form groups that share objective and set-up (size, steps, batch, sequence) and differ in the
seed. Every group is compared with the cross-entropy group of the same set-up, over the seeds both
have. Beside a difference stand two measures of doubt, which answer different questions:

    interval    over documents, by the paired bootstrap: would other documents show the same?
    seed noise  the largest gap between two runs of one objective that differ only in their seed:
                does a change that means nothing move the number as much?

A difference is called shown only where the interval excludes 0 and the difference exceeds the
seed noise. With one seed each, the noise is unknown, and nothing is called shown.
"""

from dataclasses import dataclass
from itertools import combinations
from typing import Literal

from megatron_infoentropy.evaluate.bootstrap import Interval, paired_differences
from megatron_infoentropy.evaluate.buckets import BUCKETS
from megatron_infoentropy.evaluate.evaluation import Evaluation
from megatron_infoentropy.evaluate.runs import Run

Kind = Literal["total", "bucket", "domain"]
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
    """One statistic of two groups, in nats per token; means over the paired seeds.

    `difference` is group minus baseline, `low` and `high` its interval over documents,
    `seed_noise` the largest gap between seeds, None where unknown.
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


@dataclass(frozen=True)
class Comparison:
    """A group against cross entropy, or the reason why not (`refusal`, then without rows)."""

    group: str
    baseline: str
    seeds: list[int]
    noise_seeds: dict[str, list[int]]  # seeds of each label that the noise was taken from
    rows: list[Row]
    refusal: str | None = None


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
    comparisons = []
    for group in groups:
        if group.is_baseline or not group.evaluated:
            continue
        setup = group.runs[0].setup
        baselines = [g for g in groups if g.is_baseline and g.runs[0].setup == setup]
        comparisons.append(_compare(group, baselines[0] if baselines else None))
    return comparisons


def _compare(group: Group, baseline: Group | None) -> Comparison:
    if baseline is None:
        reason = "there is no cross-entropy run of the same size, steps, batch and sequence length"
        return Comparison(group.label, "", [], {}, [], reason)
    first = {run.seed: run.evaluation for run in group.evaluated}
    second = {run.seed: run.evaluation for run in baseline.evaluated}
    seeds = sorted(first.keys() & second.keys())
    pairs = [(a, b) for s in seeds if (a := first[s]) is not None and (b := second[s]) is not None]
    refusal = None if pairs else "no seed was trained and evaluated with both objectives"
    evaluations = [e for e in (*first.values(), *second.values()) if e is not None]
    if len({evaluation.fingerprint for evaluation in evaluations}) > 1:
        refusal = "the runs were evaluated on different tokens"
    if len({e.summary["scoring"]["context_length"] for e in evaluations}) > 1:
        refusal = "the runs were evaluated with different context lengths"
    if refusal:
        return Comparison(group.label, baseline.label, seeds, {}, [], refusal)
    noisy = [g for g in (baseline, group) if len(g.evaluated) > 1]
    noise_seeds = {g.label: sorted(run.seed for run in g.evaluated) for g in noisy}
    rows = _rows(pairs, [[e for r in g.evaluated if (e := r.evaluation)] for g in noisy])
    return Comparison(group.label, baseline.label, seeds, noise_seeds, rows)


def _rows(
    pairs: list[tuple[Evaluation, Evaluation]], same_objective: list[list[Evaluation]]
) -> list[Row]:
    differences = paired_differences(pairs)
    places: list[tuple[Kind, str, Interval]] = [("total", "all tokens", differences.total)]
    places += [("bucket", name, differences.buckets[name]) for name in BUCKETS]
    places += [("domain", name, interval) for name, interval in differences.domains.items()]
    rows = []
    for kind, name, interval in places:
        if interval.difference is None:
            continue  # no scored token of that kind

        def nats(evaluation: Evaluation, kind: Kind = kind, name: str = name) -> float:
            return nats_per_token(evaluation, kind, name)

        gaps = [
            abs(nats(one) - nats(other))
            for evaluations in same_objective
            for one, other in combinations(evaluations, 2)
        ]
        rows.append(
            Row(
                kind,
                name,
                sum(nats(baseline) for _, baseline in pairs) / len(pairs),
                sum(nats(group) for group, _ in pairs) / len(pairs),
                interval.difference,
                interval.low,
                interval.high,
                interval.documents,
                max(gaps) if gaps else None,
                read_difference(interval, max(gaps) if gaps else None),
            )
        )
    return rows


def read_difference(interval: Interval, seed_noise: float | None) -> Reading:
    """What a difference shows, given both measures of doubt; see the module's text."""
    difference = interval.difference
    if difference is None or not interval.excludes_zero:
        return "no difference shown"
    if seed_noise is None:
        return "seed noise unknown"
    if abs(difference) <= seed_noise:
        return "no difference shown"
    return "better" if difference < 0 else "worse"


def nats_per_token(evaluation: Evaluation, kind: Kind, name: str) -> float:
    """One statistic of one evaluation."""
    summary = evaluation.summary
    places = {"total": {name: summary["total"]}, "bucket": summary["buckets"]}
    return float(places.get(kind, summary["domains"])[name]["nats_per_token"])


def _setup_in_words(run: Run) -> str:
    parameters, train_iters, batch, sequence = run.setup
    return f"{parameters:,} parameters, {train_iters:,} steps of {batch} x {sequence}"
