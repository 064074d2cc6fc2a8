"""Turns, parts of a step and rows of `infoentropy bench-recipe`, without Megatron."""

import json
import tempfile
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from megatron_infoentropy.bench import recipe_run
from megatron_infoentropy.bench.recipe_losses import (
    Measured,
    RecipeLoss,
    TurnTakingStep,
    choose,
    rows_of,
    turns,
)
from megatron_infoentropy.bench.recipe_run import (
    PARTS,
    bench_recipe,
    own_losses,
    recipe_tables,
    rows_of_all,
)
from megatron_infoentropy.config import InfoEntropyConfig


def test_every_loss_is_warmed_up_and_weighed_and_no_round_starts_with_the_same_one():
    planned = turns(["a", "b", "c"], 4)
    assert "".join(turn.loss for turn in planned) == "aabbcc" + "abc" + "abcbcacababc"
    assert [turn.purpose for turn in planned] == ["warm up"] * 6 + ["weigh"] * 3 + ["time"] * 12


class Training:
    """A trainer of one linear output layer: two micro-batches a step, parts of known lengths."""

    def __init__(self, clock, rounds):
        self.clock, self.iteration, self.called, self.rounds, self.weighed = clock, 0, [], [], 0
        layer = torch.nn.Linear(2, 3)
        layer.forward = lambda x: (torch.nn.functional.linear(x, layer.weight), None)
        self.model = SimpleNamespace(module=SimpleNamespace(output_layer=layer))
        lengths = {"a": 5, "b": 9}
        losses = [
            RecipeLoss(name, "ours", partial(self.forward, name, ms), partial(clock.tick, 3))
            for name, ms in lengths.items()
        ]
        planned = turns(losses, rounds)
        self.steps = len(planned) + 1
        self.step = TurnTakingStep(planned, clock, self, lambda: self.iteration, self.end)

    def start(self):
        """Begin to weigh."""
        assert len(self.called) == 8 + 2 * self.weighed, "behind the steps that warm up"

    def stop(self):
        self.weighed += 1
        return float(self.weighed)

    def end(self, measured):
        self.ended = measured
        self.rounds.append(len(measured["a"].times))

    def forward(self, name, loss_ms, data, model):
        self.called.append(name)
        self.clock.tick(10)
        logits, _ = model.module.output_layer(torch.ones(1, 2))
        self.clock.tick(loss_ms)
        return logits.sum()

    def train(self):
        for number in range(self.steps):
            self.iteration = number
            for _ in range(2):
                loss = self.step(None, self.model)
                loss.backward()
                self.clock.tick(20)
            self.step.finalize_model_grads()
            self.clock.tick(2)
        return self.ended


def test_a_step_is_told_apart_into_parts_over_its_micro_batches_and_weighed_untimed(clock):
    training = Training(clock, rounds=3)
    a, b = training.train().values()
    parts = {"forward": 20.0, "loss": 10.0, "backward": 40.0, "gradients": 3.0, "optimizer": 2.0}
    assert dict(a.parts) == {part: [ms] * 3 for part, ms in parts.items()}
    assert b.parts["loss"] == [18.0] * 3
    assert (a.times, b.times) == ([75.0] * 3, [83.0] * 3)
    assert (a.peak_mib, b.peak_mib) == (1.0, 2.0)
    assert training.called[8:12] == ["a", "a", "b", "b"]  # after the warm-up, two calls a step
    assert training.rounds == [1, 2, 3]  # every round leaves its results


FACTS = {
    **{"layers": 2, "hidden_size": 8, "vocabulary": 100, "precision": "bf16"},
    **{"layout": "tensor 1 x pipeline 2 x data 1", "ranks": 2, "tokens": 1000},
    **{"micro_batch_tokens": 500, "peak_tflops": 10.0, "held_gib": 1.0},
}


def rows_of_rank(times, peaks, held_gib):
    """What a rank writes of three losses, the second fused and the third left out."""
    losses = [
        RecipeLoss("a", "ours", None, None),
        RecipeLoss("b", "ours", None, None, calls_output_layer=False),
        RecipeLoss("c", "peer", None, None, reason="it cannot"),
    ]
    parts = [dict.fromkeys(PARTS, spent) for spent in times]
    measured = dict(zip("ab", map(Measured, times, parts, peaks), strict=True))
    return rows_of(losses, measured, FACTS | {"held_gib": held_gib}, 2e9)


@pytest.fixture
def rows():
    first = rows_of_rank([[1.0] * 4, [1.0] * 4], [7.0, 1.0], 5.0)
    times = [[10.0, 20.0, 10.0, 10.0], [13.0, 23.0, 13.0, 14.0]]
    return rows_of_all([first, rows_of_rank(times, [2.0, 3.0], 1.0)], recipe="r", parameters=123)


def test_rows_take_times_from_the_last_rank_and_memory_from_the_fullest(rows):
    a, b, c = rows
    assert (a.median_ms, b.median_ms) == (10.0, 13.5)
    assert (a.peak_mib, b.peak_mib, a.held_gib) == (7.0, 3.0, 5.0)
    assert a.tokens_per_s == pytest.approx(1000 / 0.010)
    assert a.tflops == pytest.approx(1e5 * 2e9 / 1e12)
    assert a.minus_first_ms is None
    assert (b.minus_first_low_ms, b.minus_first_ms, b.minus_first_high_ms) == (3.0, 3.0, 4.0)
    assert (a.loss_ms, b.loss_ms) == (10.0, None)
    assert (c.loss, c.reason, c.median_ms) == ("c", "it cannot", None)


def test_tables_name_what_was_not_measured(rows):
    words, losses, parts, missing = recipe_tables(rows)
    assert words.startswith("r: 123 parameters, bf16, tensor 1 x pipeline 2 x data 1, 1,000 tokens")
    assert (losses.row_count, parts.row_count) == (2, 2)
    assert list(losses.columns[3].cells) == ["", "+3.00 (+3.00 to +4.00)"]
    assert list(losses.columns[4].cells) == ["", "+30.00"]
    assert missing == "not measured: c: it cannot"


FUSED_FOCAL = ("--infoentropy-objective=focal", "--infoentropy-fused-linear")
OURS = ("focal, fused linear", "cross entropy, fused linear", "focal")


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text("model:\n  num-layers: 1\n  vocab-size: 9\nbatch:\n  train-iters: 1\n")
    return path


@pytest.mark.parametrize(
    ("line", "places", "said"),
    [
        ("iters: 1", {}, "'focal, fused linear', 'cross entropy, .*, got 'focal, fused': give"),
        ("samples: 1", {}, "needs a recipe with train-iters, not train-samples"),
        ("iters: 1\n  save: runs/a", {}, "keeps nothing, and --save runs/a would: leave it out"),
        ("iters: 1", {"data": Path()}, "--data needs the --tokenizer it was made with"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_anything_starts(
    recipe, line, places, said, monkeypatch
):
    monkeypatch.setattr(recipe_run, "follow", None)
    recipe.write_text(recipe.read_text().replace("iters: 1", line))
    with pytest.raises(ValueError, match=said):
        bench_recipe(recipe, {}, FUSED_FOCAL, losses=("focal, fused", "focal"), **places)


def test_the_ranks_are_told_the_names_of_the_losses_whatever_is_in_them(recipe, monkeypatch):
    told = []
    monkeypatch.setattr(recipe_run, "follow", lambda run, words, environment: told.extend(words))
    monkeypatch.setattr(tempfile, "tempdir", str(recipe.parent))
    with pytest.raises(ValueError, match="the training ended before every loss had taken a step"):
        bench_recipe(recipe, {}, FUSED_FOCAL, losses=OURS)
    place = told.index("megatron_infoentropy.bench.recipe_run")
    assert json.loads(told[place + 3]) == list(OURS)


@pytest.mark.parametrize("schedule", [{}, {"gamma_schedule": "linear", "gamma_samples": 9}])
def test_our_losses_have_different_names(schedule):
    focal = InfoEntropyConfig("focal", fused_linear=True, **schedule)
    assert tuple(own_losses(focal)) == OURS
    plain = InfoEntropyConfig("cross_entropy", **schedule)
    assert tuple(own_losses(plain)) == ("cross entropy", "cross entropy, fused linear")


def test_losses_are_chosen_by_their_names():
    reasons = {"infoentropy": "", "megatron": "", "fused": "no GPU", "te": "not installed"}
    every = [RecipeLoss(name, "", None, None, reason=why) for name, why in reasons.items()]
    assert choose([], every) == every
    assert choose(["fused", "megatron"], every) == every[1:3]
    with pytest.raises(ValueError, match="can be measured here: fused: no GPU; te: not installed"):
        choose(["te", "fused"], every)
