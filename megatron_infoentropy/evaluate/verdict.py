"""What the numbers show, in plain words, and what limits them. Every sentence is computed."""

from megatron_infoentropy.evaluate.comparison import NOT_EVALUATED, Comparison, Difference
from megatron_infoentropy.evaluate.groups import Group, repeats
from megatron_infoentropy.evaluate.runs import Run
from megatron_infoentropy.evaluate.wording import (
    PERCENT,
    compact,
    listed,
    nats,
    plural,
    relative,
    sentence,
    signed,
)

_SMALLEST_IN_PAPER = 468_000_000  # parameters
# Of one false claim where nothing differs, in a family of tests.
FAMILY_ERROR = 5  # percent
KINDS = {
    "total": "over all tokens",
    "bucket": "by bucket",
    "decile": "by decile",
    "difficulty": "by difficulty",
    "domain": "by domain",
    "tasks": "over all tasks",
    "task": "by task",
    "accuracy": "by task in accuracy",
}
_SHOWN = ("better", "worse")
_MOST_NAMES = 3  # of settings without a difference
_PLACES = {
    ("bucket", "high"): "frequent tokens",
    ("bucket", "medium"): "less frequent tokens",
    ("bucket", "low"): "rare tokens",
    ("difficulty", "easy"): "easy tokens",
    ("difficulty", "medium"): "middling tokens",
    ("difficulty", "hard"): "hard tokens",
}
_VERDICTS = ("better", "worse", "mixed", "none", "undecided", "too little", "identical")


def answers(comparisons: list[Comparison]) -> list[dict[str, str]]:
    """Return three questions of a reader and their answers, a short one and more about it.

    comparisons: of tokens and of tasks.
    """
    made = [comparison for comparison in comparisons if not comparison.refusal]
    asked = {
        "Did it help?": _did_it_help(comparisons, made),
        "On what?": _on_what(made),
        "How sure is that?": _how_sure(made),
    }
    return [{"question": q, "short": short, "more": more} for q, (short, more) in asked.items()]


def _did_it_help(comparisons: list[Comparison], made: list[Comparison]) -> tuple[str, str]:
    """Judge by all tokens alone, or where only tasks are compared by their mean: one family."""
    if not made:
        reasons = {comparison.refusal for comparison in comparisons}
        reason = reasons.pop() if len(reasons) == 1 else "no two runs differ in the objective alone"
        return "Nothing to compare.", f"No two objectives can be compared: {reason}."
    main = _main(made)
    of_verdict = {word: [c for c in main if _verdict_of(c) == word] for word in _VERDICTS}
    more = [_in_words(word, chosen, len(main)) for word, chosen in of_verdict.items() if chosen]
    count = {word: len(chosen) for word, chosen in of_verdict.items()}
    return _in_short(count, len(main)), " ".join(more)


def _main(made: list[Comparison]) -> list[Comparison]:
    """Return the comparisons that the first answer rests on."""
    return [c for c in made if not c.of_tasks] or made


def _judged(comparison: Comparison) -> list[Difference]:
    """Return the row that a comparison is judged by, or all tasks where their mean says nothing."""
    first = comparison.rows[0]
    tasks = [row for row in comparison.rows if row.kind == "task"]
    return tasks if first.kind == "tasks" and first.p is None else [first]


def _verdict_of(comparison: Comparison) -> str:
    if comparison.is_identical:
        return "identical"
    if not comparison.has_several_seeds:
        return "undecided"
    rows = _judged(comparison)
    if all(row.p is None for row in rows):
        return "too little"
    shown = {row.reading for row in rows} & set(_SHOWN)
    return "mixed" if len(shown) > 1 else shown.pop() if shown else "none"


def _in_short(count: dict[str, int], settings: int) -> str:
    better, worse = count["better"], count["worse"]
    if better and worse:
        return f"It depends: {better} of {settings} helped, {worse} hurt."
    if better:
        return "Yes." if better == settings else f"Yes, {better} of {settings} did."
    if worse:
        return "No, it hurt." if worse == settings else f"No, and {worse} of {settings} hurt."
    for word, short in (("mixed", "It depends."), ("none", "No difference shown.")):
        if count[word]:
            return short
    return "Undecided." if count["undecided"] or count["too little"] else "No: nothing differs."


def _scope(comparison: Comparison) -> str:
    row = _judged(comparison)[0]
    tasks = sum(row.kind == "task" for row in comparison.rows)
    if row.kind == "task":
        return f"on the task {row.name}" if tasks == 1 else f"on some of {tasks} tasks"
    return f"on average over {tasks} tasks" if row.kind == "tasks" else "over all held-out text"


def _in_words(word: str, chosen: list[Comparison], settings: int) -> str:
    """Say what the verdict `word` means, for the settings that it is given of, out of some."""
    names, first = [c.group for c in chosen], chosen[0]
    rows, scope = _judged(first), _scope(first)
    unit, others = unit_of(rows[0]), f"other {_unit(rows[0])}s or seeds"
    if word in _SHOWN:
        text = f"{word.capitalize()} than {first.baseline} {scope}: "
        if len(rows) > 1:
            return f"{text}{listed(names)}."
        sizes = [f"{c.group} by {nats(abs(_judged(c)[0].difference))}" for c in chosen]
        return f"{text}{listed(sizes)} {unit}, more than {others} explain."
    if word == "none":
        if len(names) > _MOST_NAMES:
            names = [f"{'the other ' if len(names) < settings else ''}{len(names)} settings"]
        return sentence(f"{scope} nothing tells {listed(names)} from {first.baseline}")
    if word == "undecided":
        gaps = [f"{c.group} by {signed(_judged(c)[0].difference)}" for c in chosen]
        return (
            f"The difference from {first.baseline} {scope} ({listed(gaps)} {unit}) may come from "
            "the luck of a seed: there is one of each."
        )
    return {
        "mixed": "Better on some tasks and worse on others: {}.",
        "too little": "There are too few documents to tell anything of {}.",
        "identical": "The evaluations of {} are identical to their baseline's.",
    }[word].format(listed(names))


def _on_what(made: list[Comparison]) -> tuple[str, str]:
    sure = [c for c in made if c.has_several_seeds and not c.is_identical]
    if not sure:
        seed = "With one seed of each, no part of the text can be told from the luck of a seed."
        return "Unknown.", seed if any(not c.is_identical for c in made) else ""
    of_group: dict[str, list[Difference]] = {}
    for comparison in sure:
        of_group.setdefault(comparison.group, []).extend(filter(_is_part, comparison.rows))
    count = {
        reading: sum(any(row.reading == reading for row in rows) for rows in of_group.values())
        for reading in _SHOWN
    }
    if not any(count.values()):
        kinds = {row.kind for rows in of_group.values() for row in rows}
        looked = listed([words for kind, words in KINDS.items() if kind in kinds])
        return "No part shows a difference.", f"Looked at, and corrected for: {looked}."
    if len(of_group) == 1:
        return _parts(*of_group.values()), "The tables say by how much."
    verbs = {"better": "gain somewhere", "worse": "lose somewhere"}
    short = [
        f"{number} of {len(of_group)} settings {verbs[reading]}"
        for reading, number in count.items()
        if number
    ]
    alike: dict[str, list[str]] = {}
    for group, rows in of_group.items():
        alike.setdefault(_parts(rows), []).append(group)
    more = [
        f"{listed(names)}: {text[0].lower()}{text[1:]}" for text, names in alike.items() if text
    ]
    return f"{listed(short)}.", " ".join(more)


def _is_part(row: Difference) -> bool:
    return row.kind not in ("total", "decile", "tasks")


def _parts(rows: list[Difference]) -> str:
    """Say on which parts a setting is better and worse; empty where on none."""
    said = []
    for reading in _SHOWN:
        shown = [row for row in rows if row.reading == reading]
        of_tokens = [row for row in shown if row.kind not in ("task", "accuracy")]
        places = [_PLACES.get((row.kind, row.name), row.name) for row in of_tokens]
        for kind, words in (("task", "{} of {} tasks"), ("accuracy", "{} of {} in accuracy")):
            if number := sum(row.kind == kind for row in shown):
                places.append(words.format(number, sum(row.kind == kind for row in rows)))
        if places:
            said.append(f"{reading} on {listed(places)}")
    return sentence("; ".join(said)) if said else ""


def unit_of(row: Difference) -> str:
    """Return the unit of a difference, after a number."""
    return "bits per byte" if row.kind in ("task", "tasks") else "nats per token"


def _unit(row: Difference) -> str:
    """Return what is redrawn for a row's interval, beside seeds."""
    return {"tasks": "task", "task": "item"}.get(row.kind, "document")


def _how_sure(made: list[Comparison]) -> tuple[str, str]:
    if not made:
        return "Not at all.", "It takes evaluated runs of two objectives, two seeds of each."
    main = [c for c in _main(made) if not c.is_identical]
    if not main:
        return "Wholly.", "Both give the same numbers."
    rows = [row for c in main if c.has_several_seeds for row in _judged(c)]
    sizes = sorted(row.detectable for row in rows if row.detectable)
    if not sizes:
        few = f"There are too few {_unit(_judged(main[0])[0])}s for an interval."
        return "Not at all.", few if rows else (
            "No difference of any size could have been shown: it takes two seeds of both settings."
        )
    first = next(c for c in main if c.has_several_seeds)
    row, low, high = rows[0], nats(sizes[0]), nats(sizes[-1])
    size = f"A true difference of {low} {unit_of(row)}"
    if low != high:
        each = "task" if row.kind == "task" else "setting"
        size = f"True differences of {low} to {high} {unit_of(row)}, by {each},"
    elif row.kind == "total":
        size += f" ({relative(sizes[0]).lstrip('+')} of perplexity)"
    kinds = {row.kind for c in made if c.has_several_seeds for row in c.rows if _is_part(row)}
    return (
        f"{size} would have shown.",
        f"That is in 80 of 100 studies like this, of {seeds_in_words(first)} and "
        f"{plural(row.documents, _unit(row))}; smaller ones are easily missed. Where nothing "
        f"differs, the first answer claims a difference in at most {FAMILY_ERROR} of 100 studies, "
        f"the second in at most {FAMILY_ERROR * len(kinds)}.",
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


def chances(comparisons: list[Comparison]) -> str | None:
    """Say how likely a false claim is where nothing differs; None without any claim."""
    kinds = {row.kind for c in comparisons if c.has_several_seeds for row in c.rows}
    if not kinds:
        return None
    names = [words for kind, words in KINDS.items() if kind in kinds]
    return (
        f"Where nothing differs, the chance of a false claim is at most {FAMILY_ERROR}{PERCENT} in "
        f"each kind of difference ({listed(names)}), {len(names) * FAMILY_ERROR}{PERCENT} over all "
        f"of them."
    )


def limits(runs: list[Run], groups: list[Group], comparisons: list[Comparison]) -> list[str]:
    """Return what a reader must know before believing a difference, or its absence."""
    sentences = [_size(runs)]
    if max(int(run.info["parameters"]) for run in runs) < _SMALLEST_IN_PAPER:
        sentences[0] += (
            " The paper reports its gains at 468M to 6.7B parameters; what a smaller model shows, "
            "or does not, need not hold there."
        )
    if chance := chances(comparisons):
        sentences.append(chance)
    if any(run.evaluation and not run.evaluation.summary["data"]["complete"] for run in runs):
        sentences.append("The evaluation scored a sample of the data, not all of it.")
    for run in runs:
        done, planned = run.log.last_iteration, run.info["train_iters"]
        if 0 < done < planned:
            sentences.append(f"{run.name} has logged {done} of {planned} steps.")
        if run.evaluation is None and not run.tasks:
            sentences.append(f"{run.name} has not been evaluated; only its training is shown.")
    left_out = [clause for comparison in comparisons for clause in comparison.left_out]
    left_out += [clause for group in groups for clause in repeats(group)]
    sentences += [f"Left out: {clause}." for clause in dict.fromkeys(left_out)]
    sentences += not_compared(comparisons)
    for comparison in comparisons:
        for one, other in comparison.identical:
            what = "answers" if comparison.of_tasks else "evaluations"
            sentences.append(f"The {what} of {one} and {other} are identical.")
    sentences += [f"{run.name} was trained in stages: {run.objective_label}."
                  for run in runs if len(run.stages) > 1]  # fmt: skip
    return sentences


def not_compared(comparisons: list[Comparison]) -> list[str]:
    """Name the settings that cannot be compared, where there was something to compare."""
    sentences = []
    for of_tasks, words in ((False, ""), (True, " by its answers to tasks")):
        of_kind = [c for c in comparisons if c.of_tasks == of_tasks]
        if {c.refusal for c in of_kind} != {NOT_EVALUATED}:
            sentences += [f"{c.group} is not compared{words}: {c.refusal}."
                          for c in of_kind if c.refusal]  # fmt: skip
    return sentences


def _size(runs: list[Run]) -> str:
    sizes = sorted({int(run.info["parameters"]) for run in runs})
    tokens = max(run.tokens_seen for run in runs)
    text = f"Models of {' and '.join(map(compact, sizes))} parameters"
    return text + (f" that saw at most {compact(tokens)} tokens." if tokens else ".")
