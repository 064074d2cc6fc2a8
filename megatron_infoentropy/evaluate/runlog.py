"""Megatron's console log, read back: numbers by iteration.

A training log is a mixed stream: the numbers stand in lines such as

    [2026-11-23 05:00:00.123456] iteration       10/     100 | consumed samples: 160 | ... |
    validation loss at iteration 50 | cross entropy value: 7.1E+00 | cross entropy PPL: 1.2E+03 |
    InfoEntropy at iteration 10 | perplexity: 501.0 | entropy p10: 6.1 | weight p50: 7.0 | ... |

between warnings, banners and other ranks' output. `parse_line` understands one line and says None
to everything else; it is what a progress bar needs. `parse_log` collects a whole file. Nothing
heavy is imported here.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

Values = dict[str, float]

_TRAINING = re.compile(r"\biteration\s+(?P<iteration>\d+)/\s*(?P<total>\d+)\s*\|(?P<fields>.*)")
# With several validation sets Megatron writes "validation-NAME loss"; at the end of a run it adds
# "on validation set" or "on test set" after the iteration.
_VALIDATION = re.compile(
    r"\bvalidation(?:-(?P<name>\S+))? loss at iteration (?P<iteration>\d+)"
    r"(?: on (?P<split>validation|test) set)?\s*\|(?P<fields>.*)"
)
_OBSERVATION = re.compile(r"\bInfoEntropy at iteration\s+(?P<iteration>\d+)\s*\|(?P<fields>.*)")
_FIELD = re.compile(
    r"\s*(?P<name>[^:|]+?)\s*:\s*(?P<value>[-+]?(?:\d+\.?\d*(?:[eE][-+]?\d+)?|(?i:nan|inf)))\s*"
)


@dataclass(frozen=True)
class LogLine:
    """The numbers that one line of a log reports.

    They are of training, means over a logged interval, as Megatron logs; of a validation; or,
    observed, percentiles of entropies and weights over an interval's tokens.
    """

    kind: Literal["training", "validation", "observed"]
    iteration: int
    values: Values
    train_iters: int = 0  # of training
    split: str = ""  # of a validation: validation or test
    name: str = ""  # of the validation set, where there are several


@dataclass(frozen=True)
class TrainingLog:
    """A whole log; where a resumed run logged an iteration twice, the later line counts.

    `training`, `validation` and `observed` (the distributions of entropies and weights) map an
    iteration to its values; `train_iters` is the planned length as last logged, 0 for a log without
    training lines.
    """

    training: dict[int, Values] = field(default_factory=dict)
    validation: dict[int, Values] = field(default_factory=dict)
    train_iters: int = 0
    observed: dict[int, Values] = field(default_factory=dict)

    @property
    def last_iteration(self) -> int:
        """Return the last step that a line tells of: a validation may follow unlogged ones."""
        return max((*self.training, *self.validation), default=0)


def parse_line(line: str) -> LogLine | None:
    """Understand one line of the log.

    Returns:
        The numbers of a training, validation or observation line (names as they are printed,
        without "value" for validation losses); None for any other text.
    """
    if match := _OBSERVATION.search(line):
        return LogLine("observed", int(match["iteration"]), _fields(match["fields"]))
    if match := _VALIDATION.search(line):
        values = {
            name.removesuffix(" value"): value for name, value in _fields(match["fields"]).items()
        }
        split, name = match["split"] or "validation", match["name"] or ""
        return LogLine("validation", int(match["iteration"]), values, split=split, name=name)
    if match := _TRAINING.search(line):
        fields = _fields(match["fields"])
        if fields.get("number of skipped iterations"):  # a mean over none of the steps is 0 there
            fields = {name: value for name, value in fields.items() if value}
        return LogLine("training", int(match["iteration"]), fields, int(match["total"]))
    return None


def parse_log(lines: Iterable[str]) -> TrainingLog:
    """Collect training and observation lines, and validation lines of the (one) validation set."""
    training: dict[int, Values] = {}
    validation: dict[int, Values] = {}
    observed: dict[int, Values] = {}
    train_iters = 0
    for line in lines:
        match parse_line(line):
            case LogLine("training", iteration, values, train_iters):
                training[iteration] = values
            case LogLine("validation", iteration, values, split="validation", name=""):
                validation[iteration] = values
            case LogLine("observed", iteration, values):
                observed[iteration] = values
            case _:
                pass
    for iteration, values in observed.items():  # Megatron's line leaves out what is negative
        if "objective" in values and iteration in training:
            training[iteration].setdefault("objective", values["objective"])
    return TrainingLog(training, validation, train_iters, observed)


def read_log(path: Path) -> TrainingLog:
    """Parse a log file; bytes that are not UTF-8 (a torn line) are replaced, not fatal."""
    with path.open(encoding="utf-8", errors="replace") as lines:
        return parse_log(lines)


def _fields(text: str) -> Values:
    """Return the `name: number` parts of a |-separated line, without those of another form."""
    matches = (_FIELD.fullmatch(part) for part in text.split("|"))
    return {match["name"]: float(match["value"]) for match in matches if match}
