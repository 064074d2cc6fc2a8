"""What the numbers show, in plain words, and what limits them. Every sentence is computed."""

from dataclasses import dataclass

from megatron_infoentropy.evaluate.comparison import Comparison, Group, Row
from megatron_infoentropy.evaluate.runs import Run
from megatron_infoentropy.evaluate.wording import PERCENT, compact, nats, plural, signed

_SMALLEST_IN_PAPER = 468_000_000  # parameters
_FEW_SEEDS = 5
_WORDS = {
    "better": "better, by more than other documents and other seeds explain",
    "worse": "worse, by more than other documents and other seeds explain",
    "no difference shown": "no difference shown",
    "seed noise unknown": "these runs differ, but how much a seed alone would change is unknown",
}


def headline(runs: list[Run], comparisons: list[Comparison]) -> str:
    """One or two sentences for the top of the page."""
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
        text += f"; no difference is shown for {others} others." if others else "."
    else:
        text = (
            f"No difference shown over all tokens between cross entropy and any of {len(made)} "
            "other settings."
        )
    rest = [c for c in made if c not in shown]
    buckets = [f"{c.group} is {words}" for c in rest if (words := _shown_buckets(c))]
    return f"{text} By frequency {'; '.join(buckets)} tokens." if buckets else text


def _shown_buckets(comparison: Comparison) -> str:
    rows = [row for row in _of_kind(comparison, "bucket") if _is_shown(row)]
    return " and ".join(f"{row.reading} on {row.name}-frequency" for row in rows)


def _headline_of(comparison: Comparison) -> str:
    total = comparison.rows[0]
    names = f"{comparison.group} and {comparison.baseline}"
    if total.reading == "seed noise unknown":
        return (
            f"Undecided. Over all tokens {names} differ by {signed(total.difference)} nats per "
            "token, but too few seeds were run to tell the objective from the seed."
        )
    if total.reading == "no difference shown":
        text = f"No difference shown between {names} over all tokens."
    else:
        text = (
            f"{comparison.group} scores {total.reading} than {comparison.baseline} over "
            f"all tokens, by {nats(abs(total.difference))} nats per token: more than other "
            f"documents and other seeds than the {len(comparison.seeds)} tried explain."
        )
    if (words := _shown_buckets(comparison)) and not _is_shown(total):
        text += f" By frequency {comparison.group} is {words} tokens."
    return text


@dataclass(frozen=True)
class Finding:
    """One statistic in words: what it is about, what it shows, and the numbers for that."""

    subject: str
    shows: str
    numbers: str


def findings(comparison: Comparison) -> list[Finding]:
    """What matters of a comparison: all tokens, then the frequency buckets."""
    if comparison.refusal:
        return [Finding(comparison.group, f"not compared, because {comparison.refusal}", "")]
    rows = [comparison.rows[0], *_of_kind(comparison, "bucket")]
    return [Finding(_subject(row), _WORDS[row.reading], _numbers(row)) for row in rows]


def _subject(row: Row) -> str:
    return "All tokens" if row.kind == "total" else f"{row.name.capitalize()}-frequency tokens"


def _numbers(row: Row) -> str:
    interval = "too few documents for an interval"
    if row.low is not None and row.high is not None:
        interval = f"95{PERCENT} interval {signed(row.low)} to {signed(row.high)}"
    corrected = "" if row.p_adjusted is None else f", corrected p = {row.p_adjusted:.2g}"
    return f"{signed(row.difference)} nats per token; {interval}{corrected}"


def limits(runs: list[Run], groups: list[Group], comparisons: list[Comparison]) -> list[str]:
    """What a reader must know before believing a difference, or its absence."""
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
    for group in groups:
        for run in group.repeated:
            sentences.append(
                f"{run.name} repeats an objective, set-up and seed; it is drawn, not compared."
            )
    return sentences


def smallest_effects(comparisons: list[Comparison]) -> list[str]:
    """The smallest differences that the study could have shown, a sentence a comparison."""
    sentences = []
    for comparison in comparisons:
        rows = [row for row in comparison.rows if row.kind in ("total", "bucket")]
        known = [(row, row.detectable) for row in rows if row.detectable]
        if not comparison.rows:
            continue
        if len(comparison.seeds) < 2 or not known:
            sentences.append(
                f"{comparison.group}: no difference of any size could have been shown; it takes "
                "two seeds of both objectives."
            )
            continue
        sizes = [f"{_subject(row).lower()} {nats(size)}" for row, size in known]
        sentences.append(f"{comparison.group}: {', '.join(sizes)} nats per token.")
    return sentences


def _tests_sentences(comparisons: list[Comparison]) -> list[str]:
    rows = [row for comparison in comparisons for row in comparison.rows]
    if not rows:
        return []
    return [
        f"{len(rows)} differences are tested. They are corrected (Holm) in five families: over all "
        "tokens, by bucket, by decile, by difficulty, by domain; in each, the chance of calling "
        f"anything a difference where there is none is 5{PERCENT}."
    ]


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


def _of_kind(comparison: Comparison, kind: str) -> list[Row]:
    return [row for row in comparison.rows if row.kind == kind]


def _is_shown(row: Row) -> bool:
    return row.reading in ("better", "worse")
