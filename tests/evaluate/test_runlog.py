"""Megatron's console log: what is understood, and what is passed over."""

import math
import re

import pytest

from megatron_infoentropy.evaluate.runlog import LogLine, parse_line, parse_log, read_log

TRAINING = (
    " [2026-11-23 05:00:00.123456] iteration       10/     100 | consumed samples:          160 | "
    "elapsed time per iteration (ms): 612.3 | learning rate: 3.000000E-04 | global batch size:    "
    "16 | objective: 8.912345E+00 | cross entropy: 8.9E+00 | entropy: 8.7E+00 | weight: 9.7E+00 | "
    "loss scale: 1.0 | grad norm: 2.345 | number of skipped iterations:   0 | number of nan "
    "iterations:   0 |"
)
VALIDATION = (
    " validation loss at iteration 50 | cross entropy value: 7.1E+00 | "
    "cross entropy PPL: 1.2E+03 | "
)
LOG = f"""
using world size: 2, data-parallel size: 1
WARNING: iteration counts: 3/4 are not a training line
------------------------ arguments ------------------------
  train_iters ..................................... 100
{TRAINING}
Number of parameters in billions: 0.01
---------------------------------------------------------------------------------------------------
{VALIDATION}
---------------------------------------------------------------------------------------------------
(min, max) time across ranks (ms):
 [2026-11-23 05:01:00.1] iteration       20/     100 | lr: 1.0 | cross entropy: 8.0E+00 |
 [2026-11-23 05:02:00.1] iteration       20/     100 | lr: 1.0 | cross entropy: 7.5E+00 |
 validation loss at iteration 100 on validation set | cross entropy value: 6.5E+00 |
 validation loss at iteration 100 on test set | cross entropy value: 6.6E+00 |
 validation-code loss at iteration 100 | cross entropy value: 5.5E+00 |
"""


OBSERVED = " InfoEntropy at iteration       20 | entropy p10: 6.17 | weight max: 7.336 | x: 5E-05 |"
VALUES = {
    "consumed samples": 160,
    "elapsed time per iteration (ms)": 612.3,
    "learning rate": 3e-4,
    "global batch size": 16,
    "objective": 8.912345,
    "cross entropy": 8.9,
    "entropy": 8.7,
    "weight": 9.7,
    "loss scale": 1,
    "grad norm": 2.345,
    "number of skipped iterations": 0,
    "number of nan iterations": 0,
}


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (TRAINING, LogLine("training", 10, VALUES, 100)),
        ("[rank1]: warning" + TRAINING, LogLine("training", 10, VALUES, 100)),
        (VALIDATION, LogLine("validation", 50, {"cross entropy": 7.1, "cross entropy PPL": 1200},
                             split="validation")),
        (OBSERVED, LogLine("observed", 20, {"entropy p10": 6.17, "weight max": 7.336, "x": 5e-5})),
        # Numbers of two ranks in one, and a line that was torn within a word.
        (" iteration 5/ 10 | grad norm: 1.5.2 | objective: 6.5 | le",
         LogLine("training", 5, {"objective": 6.5}, 10)),
        (" iteration 1/ 2 | grad norm: inf | loss: -1.5E+00 | note: see log |",
         LogLine("training", 1, {"grad norm": math.inf, "loss": -1.5}, 2)),
        ("", None),
        ("iteration 3 of 10", None),
        ("loss at iteration 5", None),
        ("saved checkpoint at iteration 100 to x | y", None),
    ],
)  # fmt: skip
def test_a_line_gives_every_whole_number_by_name(text, line):
    assert parse_line(text) == line


def test_nan_is_a_number():
    (loss,) = parse_line(f" iteration 1/ 2 | loss: {math.nan:.6E} |").values.values()
    assert math.isnan(loss)


def test_the_last_step_is_known_by_its_validation_where_it_is_not_logged():
    assert parse_log([TRAINING]).last_iteration == 10
    assert parse_log([TRAINING, VALIDATION.replace("50", "16")]).last_iteration == 16


def test_means_over_steps_that_were_all_skipped_are_no_numbers():
    skipped = re.sub(r"(entropy|objective|weight): [\d.E+]+", r"\1: 0.000000E+00", TRAINING)
    skipped = skipped.replace("skipped iterations:   0", "skipped iterations:   1")
    values = parse_line(skipped).values
    assert values["number of skipped iterations"] == 1
    assert {"objective", "cross entropy", "entropy", "weight"}.isdisjoint(values)


def test_a_log_is_collected_and_a_resumed_iteration_counts_once():
    log = parse_log([*LOG.splitlines(), OBSERVED, OBSERVED.replace("x:", "objective:")])
    assert log.train_iters == 100
    assert log.last_iteration == 100, "validated, not logged"
    assert [values["cross entropy"] for values in log.training.values()] == [8.9, 7.5]
    assert [values.get("objective") for values in log.training.values()] == [8.912345, 5e-5]
    assert {i: v["cross entropy"] for i, v in log.validation.items()} == {50: 7.1, 100: 6.5}
    assert log.observed[20]["entropy p10"] == 6.17


def test_a_file_with_broken_bytes_is_read(tmp_path):
    path = tmp_path / "train.log"
    path.write_bytes(b"\xff\xfe junk\n" + TRAINING.encode() + b"\n\xe9")
    assert read_log(path).training[10]["entropy"] == 8.7
