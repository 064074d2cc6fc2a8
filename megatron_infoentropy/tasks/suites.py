"""The paper's families of tasks, by the names that lm_eval 0.4.13 ships.

The paper names three families: common-sense reasoning, closed-book question answering, MMLU. Which
tasks enter its averages is not published; these are the ones that its code's copy of the harness
was edited for, and the usual ones of each family. Prompts of 0.4 differ from those of that copy, so
numbers here compare models with each other, not with the paper's tables. storycloze_2016 is left
out: its data are licensed one by one.
"""

from dataclasses import dataclass

_COMMON_SENSE = (
    "boolq",
    "piqa",
    "social_iqa",
    "hellaswag",
    "winogrande",
    "arc_easy",
    "arc_challenge",
    "openbookqa",
)
_CLOSED_BOOK = ("nq_open", "triviaqa", "webqs")


@dataclass(frozen=True)
class Question:
    """A task or a group of tasks; `shots` examples in the prompt, None for the task's own."""

    task: str
    shots: int | None = None

    @property
    def name(self) -> str:
        """Of the result's file, and for a reader."""
        return self.task if self.shots is None else f"{self.task}-{self.shots}shot"


SUITES: dict[str, tuple[Question, ...]] = {
    "commonsense": tuple(Question(task, 0) for task in _COMMON_SENSE),
    "commonsense-5shot": tuple(Question(task, 5) for task in _COMMON_SENSE),
    "closed-book": tuple(Question(task, 0) for task in _CLOSED_BOOK),
    "mmlu": (Question("mmlu", 5),),  # letters A to D, as usual
    "mmlu-texts": (Question("mmlu_continuation", 5),),  # the options' texts, as in the paper's code
}


def questions_of(
    suites: tuple[str, ...], tasks: tuple[str, ...], shots: int | None
) -> list[Question]:
    """What to ask, each question once, suites first.

    Raises:
        ValueError: no suite has such a name, or nothing to ask.
    """
    unknown = [name for name in suites if name not in SUITES]
    if unknown:
        raise ValueError(f"there is no suite {', '.join(unknown)}; there are {', '.join(SUITES)}")
    asked = [question for name in suites for question in SUITES[name]]
    asked += [Question(task, shots) for task in tasks]
    if not asked:
        raise ValueError(f"nothing to ask: name a suite ({', '.join(SUITES)}) or tasks")
    return list(dict.fromkeys(asked))
