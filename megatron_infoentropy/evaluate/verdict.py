"""What the numbers show, in plain words, and what limits them. Every sentence is computed."""

from dataclasses import dataclass

from megatron_infoentropy.evaluate.comparison import Comparison, Group, Row
from megatron_infoentropy.evaluate.runs import Run
from megatron_infoentropy.evaluate.wording import PERCENT, compact, nats, plural, signed

_SMALLEST_IN_PAPER = 468_000_000  # parameters
_FEW_SEEDS = 5
_WORDS = {
    "better": "better, by more than the documents explain and these seeds differ",
    "worse": "worse, by more than the documents explain and these seeds differ",
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
    if len(made) > 1:
        shown = sum(comparison.rows[0].reading in ("better", "worse") for comparison in made)
        return (
            f"{shown} of {len(made)} objectives differ from cross entropy over all tokens by more "
            "than the documents explain and these seeds differ."
        )
    return _headline_of(made[0])


def _headline_of(comparison: Comparison) -> str:
    total, buckets = comparison.rows[0], _of_kind(comparison, "bucket")
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
            f"all tokens, by {nats(abs(total.difference))} nats per token: more than the documents "
            f"or the {plural(len(comparison.seeds), 'seed')} tried explain."
        )
    shown = [f"{row.reading} on {row.name}-frequency" for row in buckets if _is_shown(row)]
    if shown and not _is_shown(total):
        text += f" By frequency {comparison.group} is {' and '.join(shown)} tokens."
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
        interval = f"95{PERCENT} over documents {signed(row.low)} to {signed(row.high)}"
    noise = "seed noise unknown"
    if row.seed_noise is not None:
        noise = f"seeds alone: up to {row.seed_noise:.4f}"
    return f"{signed(row.difference)} nats per token; {interval}; {noise}"


def limits(runs: list[Run], groups: list[Group], comparisons: list[Comparison]) -> list[str]:
    """What a reader must know before believing a difference, or its absence."""
    sentences = [_size_sentence(runs, comparisons), _seeds_sentence(groups)]
    rows = sum(len(comparison.rows) for comparison in comparisons)
    if rows:
        sentences.append(
            f"{rows} differences are tested, each with a 95{PERCENT} interval: where nothing "
            "differs, one in twenty excludes 0 by chance."
        )
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
