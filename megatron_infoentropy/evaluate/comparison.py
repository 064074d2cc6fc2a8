"""Settings compared: the evaluations of one against those of another, with what is uncertain.

Several differences are read at once, so their p-values are adjusted by Holm's rule, in families
that each answer one question: over all tokens (one per group), by frequency bucket, by decile, by
difficulty, by domain, and of tasks the mean over them, each one's bits per byte, each one's
accuracy (each over all groups). A difference is called shown where its adjusted p-value is below
5 % and seeds were part of it; with one seed each, nothing is called shown.

Easy, medium and hard tokens are the same ones for every evaluation that is compared. A token's
difficulty is an entropy, but whose? That of one of the models compared would bend the
comparison: its own uncertain tokens hold the ones it is needlessly uncertain about, where the other
is better for no other reason. So it is the mean entropy over all settings compared, each the mean
of its seeds: it favours none of them, however many runs each has. The thirds are as equal in tokens
as bins of 0.004 nats allow.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from megatron_infoentropy.evaluate.evaluation import Evaluation
from megatron_infoentropy.evaluate.groups import (
    Group,
    Match,
    Pairing,
    match,
    one_model_twice,
)
from megatron_infoentropy.evaluate.inference import (
    CONFIDENCE,
    Estimate,
    Sums,
    estimate_differences,
    holm,
)
from megatron_infoentropy.evaluate.runs import Run
from megatron_infoentropy.evaluate.tally import BANDS_OF, BUCKETS, DECILES, DIFFICULTY

Kind = Literal["total", "bucket", "decile", "difficulty", "domain", "tasks", "task", "accuracy"]
Place = tuple[Kind, str]
Reading = Literal["better", "worse", "no difference shown", "seed noise unknown"]
Scores = NDArray[np.float16]

NOT_EVALUATED = "no run of it has been evaluated"
NO_BASELINE = "there is no cross-entropy run of the same size, steps, batch and sequence length"
_SETTINGS = {
    "mode": "mode",
    "context_length": "context length",
    "stride": "stride of windows",
    "batch_tokens": "number of batch tokens, which says where packs start",
}
_BLOCK = 1 << 22  # tokens that are in memory at once
_BINS = 4096
_LARGEST = 16.0  # nats; ln of nine million


@dataclass(frozen=True)
class Difference:
    """One statistic of two groups, means over the seeds compared: of tokens in nats per token, of
    tasks in bits per byte of the right answers, or a share of right ones (`accuracy`).

    `difference` is group minus baseline, and better below 0 but for accuracy. `low` and `high`
    bound its 95 % interval, over documents and, where there are several, over seeds; `p` belongs to
    it and `p_adjusted` to its family of `tests`; `detectable` is the smallest true difference that
    the adjusted test would show in 80 of 100 repetitions. They are None where there are too few
    `documents` (of a task its items; of a group of tasks or the mean over all, tasks), `detectable`
    also where there is one seed: then nothing is called shown.
    """

    kind: Kind
    name: str
    baseline: float
    group: float
    difference: float
    low: float | None
    high: float | None
    documents: int
    reading: Reading = "no difference shown"
    standard_error: float | None = None
    p: float | None = None
    p_adjusted: float | None = None
    tests: int = 1
    detectable: float | None = None


Rows = list[tuple[Difference, Estimate]]


@dataclass(frozen=True)
class Comparison:
    """A group against its baseline, or the reason why not (`refusal`, then without rows)."""

    group: str
    baseline: str
    seeds: list[int]  # that were compared, of either side
    rows: list[Difference]
    refusal: str | None = None
    pairing: Pairing = "seed"
    compared: list[list[str]] = field(default_factory=list)  # names of runs, the group's first
    left_out: list[str] = field(default_factory=list)  # evaluated runs: a name and a reason each
    identical: list[list[str]] = field(default_factory=list)  # pairs with the same scores
    of_tasks: bool = False  # else of tokens

    @property
    def has_several_seeds(self) -> bool:
        return all(len(names) > 1 for names in self.compared)

    @property
    def is_identical(self) -> bool:
        """Say whether there is nothing to compare: all pairs have the same scores."""
        return bool(self.rows) and len(self.identical) == len(self.compared[0])


def with_baselines(groups: list[Group]) -> list[tuple[Group, Group | None]]:
    """Return every other group with the cross-entropy group of its set-up, if there is one."""
    baselines = {group.runs[0].setup: group for group in reversed(groups) if group.is_baseline}
    others = [group for group in groups if not group.is_baseline]
    return [(group, baselines.get(group.runs[0].setup)) for group in others]


def compare_pairs(pairs: list[tuple[Group, Group | None]]) -> list[Comparison]:
    """Compare each group with its baseline; one correction over all of them."""
    # All, so that "hard" is the same tokens in every row of a family.
    groups = {id(group): group for pair in pairs for group in pair if group is not None}
    every = [group.evaluations for group in groups.values()]
    return corrected([_compare(*pair, _scored_alike(pair[0], every)) for pair in pairs])


def _compare(
    group: Group, baseline: Group | None, references: list[list[Evaluation]]
) -> tuple[Comparison, Rows]:
    """Return a comparison without its rows, and these, whose p-values are not adjusted yet."""
    if baseline is None:
        return without_baseline(group, NO_BASELINE if group.evaluated else NOT_EVALUATED), []
    matched = match(group, baseline)
    made = described(group, baseline, matched)
    if refusal := _refusal(group, baseline, matched):
        return replace(made, refusal=refusal), []
    compared = [run.evaluation for run in (*matched.ours, *matched.theirs) if run.evaluation]
    rows = differences(*statistics(compared, references), matched)
    return replace(made, identical=matched.identical(_are_identical)), rows


def _are_identical(one: Run, other: Run) -> bool:
    """Say whether every document has the same cross entropy in both, to the bit."""
    first, second = (run.evaluation.documents.ce for run in (one, other) if run.evaluation)
    return np.array_equal(first, second)


def _are_one_model(one: Run, other: Run) -> bool:
    models = [run.evaluation.summary["model"] for run in (one, other) if run.evaluation]
    return models[0]["weights_sha256"] == models[1]["weights_sha256"] or _are_identical(one, other)


def without_baseline(group: Group, reason: str) -> Comparison:
    return Comparison(group.label, "", [], [], reason, of_tasks=group.counted == "asked")


def described(group: Group, baseline: Group, matched: Match) -> Comparison:
    """Return a comparison that says what is set against what, without rows."""
    known = group.seeds_known and baseline.seeds_known
    return Comparison(
        group.label,
        baseline.label,
        sorted({run.seed for run in (*matched.ours, *matched.theirs)}) if known else [],
        rows=[],
        pairing=matched.pairing,
        compared=[[run.name for run in side] for side in (matched.ours, matched.theirs)],
        left_out=matched.left_out,
        of_tasks=group.counted == "asked",
    )


def _refusal(group: Group, baseline: Group, matched: Match) -> str | None:
    """Return why two settings cannot be compared, if so."""
    if not group.evaluated:
        return NOT_EVALUATED
    return (
        _scored_differently([*group.evaluations, *baseline.evaluations])
        or one_model_twice(group.evaluated, _are_one_model, "evaluated")
        or one_model_twice(baseline.evaluated, _are_one_model, "evaluated")
        or (None if matched.ours else "no seed was trained and evaluated with both objectives")
    )


def _way_of_scoring(evaluation: Evaluation) -> tuple[str, ...]:
    """Return what is equal for evaluations that can be compared: the tokens, and the windows."""
    scoring = evaluation.summary["scoring"]
    if scoring["mode"] != "packed":
        scoring = scoring | {"batch_tokens": None}
    return evaluation.fingerprint, *(str(scoring[setting]) for setting in _SETTINGS)


def _scored_differently(evaluations: list[Evaluation]) -> str | None:
    ways = map(_way_of_scoring, evaluations)
    tokens, *settings = (set(values) for values in zip(*ways, strict=True))
    if len(tokens) > 1:
        return "the runs were evaluated on different tokens, or with different --token-counts"
    for words, values in zip(_SETTINGS.values(), settings, strict=True):
        if len(values) > 1:
            values_in_words = " and ".join(sorted(values))
            return f"the runs were evaluated with a different {words}: {values_in_words}"
    return None


def _scored_alike(group: Group, every: list[list[Evaluation]]) -> list[list[Evaluation]]:
    """Return those that can guide the group's comparison: a page may show others too."""
    own = {_way_of_scoring(evaluation) for evaluation in group.evaluations}
    kept = [[e for e in evaluations if _way_of_scoring(e) in own] for evaluations in every]
    return [evaluations for evaluations in kept if evaluations]


def differences(places: list[Place], sums: Sums, matched: Match) -> Rows:
    """Return the differences of all statistics that occur, not corrected, and their estimates.

    sums: of the runs that are matched, ours first.
    """
    ours = len(matched.ours)
    sides = list(range(ours)), list(range(ours, len(sums.ce)))
    estimates = estimate_differences(sums, *sides, paired=matched.pairing != "unpaired")
    group, baseline = (sums.nats()[side].mean(axis=0).tolist() for side in sides)
    rows: Rows = []
    for column, (place, one) in enumerate(zip(places, estimates, strict=True)):
        if one.difference is not None:
            row = Difference(
                *place,
                baseline[column],
                group[column],
                one.difference,
                one.low,
                one.high,
                one.documents,
                standard_error=one.standard_error,
                p=one.p,
            )
            rows.append((row, one))
    return rows


def corrected(made: list[tuple[Comparison, Rows]]) -> list[Comparison]:
    """Put rows into their comparisons: p-values adjusted over all of one kind, and readings."""
    adjusted: dict[Kind, Iterator[float | None]] = {}
    tests: dict[Kind, int] = {}
    for kind in get_args(Kind):
        p_values = [row.p for _, rows in made for row, _ in rows if row.kind == kind]
        adjusted[kind] = iter(holm(p_values))
        tests[kind] = max(sum(p is not None for p in p_values), 1)
    return [
        replace(
            comparison,
            rows=[
                _read(
                    replace(row, p_adjusted=next(adjusted[row.kind]), tests=tests[row.kind]),
                    estimate if comparison.has_several_seeds else None,
                )
                for row, estimate in rows
            ],
        )
        for comparison, rows in made
    ]


def _read(row: Difference, estimate: Estimate | None) -> Difference:
    """Say what a corrected difference shows; `estimate` is None where seeds had no part in it."""
    reading: Reading = "no difference shown"
    if row.p_adjusted is not None and row.p_adjusted < 1 - CONFIDENCE:
        reading = "better" if (row.difference < 0) != (row.kind == "accuracy") else "worse"
        reading = reading if estimate else "seed noise unknown"
    detectable = estimate.detectable(row.tests) if estimate else None
    return replace(row, reading=reading, detectable=detectable)


def statistics(
    evaluations: list[Evaluation], references: list[list[Evaluation]]
) -> tuple[list[Place], Sums]:
    """Return every statistic that is compared, and its sums per document."""
    documents = evaluations[0].documents
    every = [documents.tokens.astype(np.float64), *(e.documents.ce for e in evaluations)]
    by_band = np.stack(every)
    in_domain = documents.domain[:, None] == np.arange(len(evaluations[0].domains))
    total = by_band.sum(axis=2, keepdims=True)
    parts = [total]
    parts += [by_band[:, :, BANDS_OF[n]].sum(axis=2, keepdims=True) for n in (*BUCKETS, *DECILES)]
    places: list[Place] = [("total", "all tokens"), *(("bucket", name) for name in BUCKETS)]
    places += [("decile", name) for name in DECILES]
    tokens, ce = difficulty_sums(evaluations, references)
    parts.append(np.concatenate([tokens[None], ce]))
    places += [("difficulty", name) for name in DIFFICULTY]
    parts.append(total * in_domain)
    places += [("domain", name) for name in evaluations[0].domains]
    table = np.concatenate(parts, axis=2)
    return places, Sums(table[0], table[1:])


def difficulty_sums(
    evaluations: list[Evaluation], references: list[list[Evaluation]]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return tokens [D, 3] per document and third, and each evaluation's cross entropies [E, D, 3].

    references: the settings whose mean entropy is the difficulty, each a list of evaluations;
    all must have scored the same tokens.
    """
    scores = [evaluation.token_scores for evaluation in evaluations]
    guides = [[evaluation.token_scores for evaluation in setting] for setting in references]
    scored = len(scores[0])
    lengths = evaluations[0].documents.tokens.sum(axis=1)
    counts = np.zeros(_BINS)
    for tokens in _blocks(scored):
        counts += np.bincount(_bins(guides, tokens), minlength=_BINS)
    third_of_bin = np.minimum(3 * (np.cumsum(counts) - counts / 2) // counts.sum(), 2).astype(int)
    ends = np.cumsum(lengths)
    cells = len(lengths) * len(DIFFICULTY)
    tokens_sum, ce = np.zeros(cells), np.zeros((len(scores), cells))
    for tokens in _blocks(scored):
        document = np.searchsorted(ends, np.arange(tokens.start, tokens.stop), side="right")
        cell = document * len(DIFFICULTY) + third_of_bin[_bins(guides, tokens)]
        tokens_sum += np.bincount(cell, minlength=cells)
        for total, part in zip(ce, scores, strict=True):
            total += np.bincount(cell, weights=part[tokens, 0], minlength=cells)
    shape = len(lengths), len(DIFFICULTY)
    return tokens_sum.reshape(shape), ce.reshape(-1, *shape)


def _blocks(tokens: int) -> Iterator[slice]:
    for first in range(0, tokens, _BLOCK):
        yield slice(first, min(first + _BLOCK, tokens))


def _bins(guides: list[list[Scores]], tokens: slice) -> NDArray[np.int64]:
    """Return the bins of the tokens' difficulties: means over settings, each of its evaluations."""
    entropy = np.zeros(tokens.stop - tokens.start)
    for setting in guides:
        total = np.zeros_like(entropy)
        for guide in setting:
            total += guide[tokens, 1]
        entropy += total / len(setting)
    scale = _BINS / _LARGEST / len(guides)
    return np.clip((entropy * scale).astype(np.int64), 0, _BINS - 1)
