"""What the numbers show, in plain words, and what limits them. Every sentence is computed."""

from dataclasses import dataclass

from megatron_infoentropy.evaluate.comparison import Comparison, Difference
from megatron_infoentropy.evaluate.groups import Group, repeats
from megatron_infoentropy.evaluate.runs import Run
from megatron_infoentropy.evaluate.wording import PERCENT, compact, nats, plural, signed

_SMALLEST_IN_PAPER = 468_000_000  # parameters
_FEW_SEEDS = 5
# Of one false claim where nothing differs, in a family of tests.
FAMILY_ERROR = 5  # percent
NO_POWER = "no difference of any size could have been shown: it takes two seeds of both settings"
_WORDS = {
    "better": "better, by more than other documents and other seeds explain",
    "worse": "worse, by more than other documents and other seeds explain",
    "no difference shown": "no difference shown",
    "seed noise unknown": "these runs differ, but how much a seed alone would change is unknown",
}


def headline(runs: list[Run], comparisons: list[Comparison]) -> str:
    """Return one or two sentences for the top of the page."""
    made = [comparison for comparison in comparisons if not comparison.refusal]
    if not any(run.evaluation for run in runs):
        return "Training curves only: no run has been evaluated, so nothing is compared."
    if not made:
        reasons = {comparison.refusal for comparison in comparisons}
        reason = reasons.pop() if len(reasons) == 1 else "no two runs differ in the objective alone"
        return f"No comparison between objectives: {reason}."
    return _headline_of_several(made) if len(made) > 1 else _headline_of(made[0])


def _headline_of_several(made: list[Comparison]) -> str:
    shown = [c for c in made if _is_shown(c.rows[0])]
    if shown:
        scored = " and ".join(f"{c.group} scores {c.rows[0].reading}" for c in shown)
        text = f"Over all tokens {scored} than cross entropy"
        others = len(made) - len(shown)
        return text + (f"; no difference is shown for {others} others." if others else ".")
    return (
        f"No difference shown over all tokens between cross entropy and any of {len(made)} other "
        "settings."
    )


def _headline_of(comparison: Comparison) -> str:
    """Judge by all tokens alone: so it errs no oftener than one family of tests."""
    total = comparison.rows[0]
    names = f"{comparison.group} and {comparison.baseline}"
    if comparison.is_identical:
        return f"The evaluations of {names} are identical: there is nothing to compare."
    if total.reading == "seed noise unknown":
        return (
            f"Undecided. Over all tokens {names} differ by {signed(total.difference)} nats per "
            "token, but too few seeds were run to tell the objective from the seed."
        )
    if total.reading == "no difference shown":
        return f"No difference shown between {names} over all tokens."
    return (
        f"{comparison.group} scores {total.reading} than {comparison.baseline} over all tokens, by "
        f"{nats(abs(total.difference))} nats per token: more than other documents and other seeds "
        f"than the {seeds_in_words(comparison)} tried explain."
    )


def seeds_in_words(comparison: Comparison) -> str:
    """Return `3 seeds` of both, or `3 and 2 seeds`."""
    ours, theirs = map(len, comparison.compared)
    return plural(ours, "seed") if ours == theirs else f"{ours} and {theirs} seeds"


def how_matched(comparison: Comparison) -> str:
    """Say which evaluations were set against which."""
    if not comparison.compared:
        return "not compared"
    ours, theirs = map(len, comparison.compared)
    seeds = f" ({', '.join(map(str, comparison.seeds))})" if comparison.seeds else ""
    return {
        "seed": f"paired by seed{seeds}",
        "order": "paired by order, as their seeds are not known",
        "unpaired": f"unpaired, {ours} and {theirs} evaluations",
        "one": "one evaluation of each",
    }[comparison.pairing]


@dataclass(frozen=True)
class Finding:
    """One statistic in words: what it is about, what it shows, and the numbers for that."""

    subject: str
    shows: str
    numbers: str


def findings(comparison: Comparison) -> list[Finding]:
    """Return what matters of a comparison: all tokens, then the frequency buckets."""
    if comparison.refusal:
        return [Finding(comparison.group, f"not compared, because {comparison.refusal}", "")]
    if comparison.is_identical:
        return [Finding("All tokens", "the evaluations are identical", "")]
    rows = [comparison.rows[0], *_of_kind(comparison, "bucket")]
    return [Finding(_subject(row), _WORDS[row.reading], _numbers(row)) for row in rows]


def chances(comparisons: list[Comparison]) -> str | None:
    """Say how likely a false claim is where nothing differs; None without any claim."""
    kinds = {row.kind for c in comparisons if c.has_several_seeds for row in c.rows}
    if not kinds:
        return None
    return (
        f"Where nothing differs, the chance of a false claim is at most {FAMILY_ERROR}{PERCENT} "
        f"over all tokens, and as much in each other kind of difference: "
        f"{len(kinds) * FAMILY_ERROR}{PERCENT} over all {len(kinds)} kinds."
    )


def _subject(row: Difference) -> str:
    return "All tokens" if row.kind == "total" else f"{row.name.capitalize()}-frequency tokens"


def _numbers(row: Difference) -> str:
    interval = "too few documents for an interval"
    if row.low is not None and row.high is not None:
        interval = f"95{PERCENT} (single) {signed(row.low)} to {signed(row.high)}"
    corrected = "" if row.p_adjusted is None else f", p (Holm) = {row.p_adjusted:.2g}"
    return f"{signed(row.difference)} nats per token; {interval}{corrected}"


def limits(runs: list[Run], groups: list[Group], comparisons: list[Comparison]) -> list[str]:
    """Return what a reader must know before believing a difference, or its absence."""
    sentences = [_size_sentence(runs, comparisons), _seeds_sentence(groups)]
    sentences += _tests_sentences(comparisons)
    if any(run.evaluation and not run.evaluation.summary["data"]["complete"] for run in runs):
        sentences.append("The evaluation scored a sample of the data, not all of it.")
    for run in runs:
        done, planned = run.log.last_iteration, run.info["train_iters"]
        if 0 < done < planned:
            sentences.append(f"{run.name} has logged {done} of {planned} steps.")
        if run.evaluation is None:
            sentences.append(f"{run.name} has not been evaluated; only its training is shown.")
    left_out = [clause for comparison in comparisons for clause in comparison.left_out]
    left_out += [clause for group in groups for clause in repeats(group)]
    sentences += [f"Left out: {clause}." for clause in dict.fromkeys(left_out)]
    for comparison in comparisons:
        for one, other in comparison.identical:
            sentences.append(f"The evaluations of {one} and {other} are identical.")
    sentences += [f"{run.name} was trained in stages: {run.objective_label}."
                  for run in runs if len(run.stages) > 1]  # fmt: skip
    return sentences


def smallest_effects(comparisons: list[Comparison]) -> list[str]:
    """Return the smallest differences that could have been shown, a sentence a comparison."""
    sentences = []
    for comparison in comparisons:
        if not comparison.rows or comparison.is_identical:
            continue
        rows = [row for row in comparison.rows if row.kind in ("total", "bucket")]
        sizes = [
            f"{_subject(row).lower()} {nats(row.detectable)}" for row in rows if row.detectable
        ]
        if not comparison.has_several_seeds:
            sentences.append(f"{comparison.group}: {NO_POWER}.")
        elif sizes:
            sentences.append(f"{comparison.group}: {', '.join(sizes)} nats per token.")
    return sentences


def _tests_sentences(comparisons: list[Comparison]) -> list[str]:
    rows = [row for comparison in comparisons for row in comparison.rows]
    if not rows:
        return []
    kinds = {"total": "over all tokens", "bucket": "by bucket", "decile": "by decile",
             "difficulty": "by difficulty", "domain": "by domain"}  # fmt: skip
    names = [words for kind, words in kinds.items() if kind in {row.kind for row in rows}]
    sentences = [
        f"{len(rows)} differences are tested. Their p-values are corrected (Holm) in "
        f"{len(names)} families: {', '.join(names)}. Intervals are single: they are not corrected."
    ]
    if chance := chances(comparisons):
        sentences.append(f"{chance} The headline rests on all tokens alone.")
    return sentences


def _size_sentence(runs: list[Run], comparisons: list[Comparison]) -> str:
    sizes = sorted({int(run.info["parameters"]) for run in runs})
    tokens = max(run.tokens_seen for run in runs)
    text = f"Models of {' and '.join(map(compact, sizes))} parameters"
    text += f" that saw at most {compact(tokens)} tokens." if tokens else "."
    if sizes[-1] >= _SMALLEST_IN_PAPER:
        return text
    text += " The paper reports its gains at 468M to 6.7B parameters;"
    text += " at this size the effect is likely below noise"
    noises = [c.rows[0].seed_noise for c in comparisons if c.rows]
    known = [noise for noise in noises if noise is not None]
    if known:
        return f"{text}, and noise here is {max(known):.4f} nats per token between two seeds."
    return f"{text}, and how large noise is here is unknown: it takes two seeds of one objective."


def _seeds_sentence(groups: list[Group]) -> str:
    counts = [f"{group.label}: {plural(len(group.runs), 'seed')}" for group in groups]
    most = max(len(group.runs) for group in groups)
    doubt = " A spread over so few seeds is itself uncertain." if 1 < most < _FEW_SEEDS else ""
    return f"Seeds: {'; '.join(counts)}.{doubt}"


def _of_kind(comparison: Comparison, kind: str) -> list[Difference]:
    return [row for row in comparison.rows if row.kind == kind]


def _is_shown(row: Difference) -> bool:
    return row.reading in ("better", "worse")
