"""docs/data-scale.md says what the model says, and the model keeps its bounds."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))
import data_scale


def test_the_page_has_the_numbers_of_the_model():
    page = data_scale.PAGE.read_text(encoding="utf-8")
    assert data_scale.renewed(page) == page, "run tools/data_scale.py --write"


def test_more_machines_help_until_each_file_has_its_task():
    costs, _ = data_scale.measured()
    plans = {n: data_scale.predict(costs["hf"], n) for n in (1, 2, 8, 30, 64, 1000)}
    seconds = [plan.preprocess for plan in plans.values()]
    assert seconds == sorted(seconds, reverse=True)
    assert plans[1].preprocess == pytest.approx(2 * plans[2].preprocess, rel=0.2)
    assert plans[64].preprocess == plans[1000].preprocess
    assert all(plan.tasks <= data_scale.PILE.files for plan in plans.values())
    slow = data_scale.Machine(cores=32, disk=10.0)
    held = data_scale.predict(costs["gigatoken"], 1, machine=slow)
    assert held.bound == "disk"
    assert held.preprocess == pytest.approx(800e3 * 0.93 / 10)
