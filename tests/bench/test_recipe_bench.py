"""Turns, parts of a step and rows of `infoentropy bench-recipe`, without Megatron."""

import json
import tempfile
from types import SimpleNamespace

import pytest
import torch

from megatron_infoentropy.bench import recipe_run
from megatron_infoentropy.bench.recipe_losses import RecipeLoss, TurnTakingStep, choose, turns
from megatron_infoentropy.bench.recipe_run import (
    PARTS,
    RankResult,
    bench_recipe,
    own_losses,
    recipe_tables,
    rows_of,
)
from megatron_infoentropy.config import InfoEntropyConfig


class CountingClock:
    """Time passes by `tick` alone."""

    def __init__(self):
        self.now = 0.0

    def tick(self, ms):
        self.now += ms

    def start(self):
        self.marks = [self.now]

    def mark(self):
        self.marks.append(self.now)

    def read(self):
        return [after - before for before, after in zip(self.marks, self.marks[1:], strict=False)]


class Meter:
    def __init__(self):
        self.calls = []

    def start(self):
        self.calls.append("start")

    def stop(self):
        self.calls.append("stop")
        return float(len(self.calls))


def test_every_loss_is_warmed_up_and_weighed_and_no_round_starts_with_the_same_one():
    planned = turns(["a", "b", "c"], 4)
    assert [turn.loss for turn in planned] == [
        *"aabbcc",
        *"abc",
        *"abc",
        *"bca",
        *"cab",
        *"abc",
    ]
    assert [turn.purpose for turn in planned] == ["warm up"] * 6 + ["weigh"] * 3 + ["time"] * 12


class Training:
    """A trainer of one linear output layer: two micro-batches a step, parts of known lengths."""

    def __init__(self, rounds):
        self.clock, self.meter, self.ended = CountingClock(), Meter(), None
        self.iteration, self.called, self.rounds = 0, [], []
        layer = torch.nn.Linear(2, 3)
        layer.forward = lambda x: (torch.nn.functional.linear(x, layer.weight), None)
        self.model = SimpleNamespace(module=SimpleNamespace(output_layer=layer))
        losses = [
            RecipeLoss(name, "ours", self.forward(name, ms), self.finalize)
            for name, ms in (("a", 5), ("b", 9))
        ]
        planned = turns(losses, rounds)
        self.steps = len(planned) + 1
        self.step = TurnTakingStep(
            planned, self.clock, self.meter, lambda: self.iteration, self.end
        )

    def end(self, measured):
        self.ended = measured
        self.rounds.append(len(measured["a"].times))

    def forward(self, name, loss_ms):
        def step(data, model):
            self.called.append(name)
            self.clock.tick(10)
            logits, _ = model.module.output_layer(torch.ones(1, 2))
            self.clock.tick(loss_ms)
            return logits.sum()

        return step

    def finalize(self):
        self.clock.tick(3)

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


def test_the_parts_of_a_step_are_told_apart_over_all_its_micro_batches():
    training = Training(rounds=3)
    measured = training.train()
    assert dict(measured["a"].parts) == {
        "forward": [20.0] * 3,
        "loss": [10.0] * 3,
        "backward": [40.0] * 3,
        "gradients": [3.0] * 3,
        "optimizer": [2.0] * 3,
    }
    assert measured["b"].parts["loss"] == [18.0] * 3
    assert measured["a"].times == [75.0] * 3
    assert measured["b"].times == [83.0] * 3
    assert training.called[8:12] == ["a", "a", "b", "b"]  # after the warm-up, two calls a step


def test_every_round_leaves_its_results():
    training = Training(rounds=3)
    training.train()
    assert training.rounds == [1, 2, 3]


def test_memory_is_weighed_in_steps_that_are_not_timed():
    training = Training(rounds=3)
    measured = training.train()
    assert training.meter.calls == ["start", "stop"] * 2
    assert (measured["a"].peak_mib, measured["b"].peak_mib) == (2.0, 4.0)


def seen(name, times, peak_mib, *, parts=True):
    spans = {part: times for part in PARTS}
    return {
        **{"name": name, "by": "ours", "calls_output_layer": parts},
        **{"times": times, "parts": spans, "peak_mib": peak_mib},
    }


FACTS = {
    **{"layers": 2, "hidden_size": 8, "vocabulary": 100, "precision": "bf16"},
    **{"layout": "tensor 1 x pipeline 2 x data 1", "ranks": 2, "tokens": 1000},
    **{"micro_batch_tokens": 500, "flops_per_token": 4e9, "peak_tflops": 10.0},
    **{"matmul_tflops": 8.0, "held_gib": 1.0},
}


@pytest.fixture
def rows():
    first = [seen("a", [0.0] * 4, 7.0), seen("b", [0.0] * 4, 1.0)]
    last = [
        seen("a", [10.0, 20.0, 10.0, 10.0], 2.0),
        seen("b", [13.0, 23.0, 13.0, 14.0], 3.0, parts=False),
    ]
    left_out = [("c", "it cannot")]
    return rows_of(
        "r",
        123,
        [RankResult(first, [], FACTS | {"held_gib": 5.0}), RankResult(last, left_out, FACTS)],
    )


def test_rows_take_times_from_the_last_rank_and_memory_from_the_fullest(rows):
    a, b, c = rows
    assert (a.median_ms, b.median_ms) == (10.0, 13.5)
    assert (a.peak_mib, b.peak_mib, a.held_gib) == (7.0, 3.0, 5.0)
    assert a.tokens_per_s == pytest.approx(1000 / 0.010)
    assert a.tflops == pytest.approx(1e5 * 4e9 / 2 / 1e12)  # a rank's half
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


OURS = ("focal, fused linear", "cross entropy, fused linear", "focal")


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text("model:\n  num-layers: 1\n  vocab-size: 9\nbatch:\n  train-iters: 1\n")
    return path


def test_data_without_their_tokenizer_are_refused(recipe):
    with pytest.raises(ValueError, match="--data needs the --tokenizer it was made with"):
        bench_recipe(recipe, {}, data=recipe.parent)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("iters: 1", "among 'focal, fused linear', 'cross entropy, .*, got 'focal, fused': give"),
        ("samples: 1", "needs a recipe with train-iters, not train-samples"),
        ("iters: 1\n  save: runs/a", "keeps nothing, and --save runs/a would: leave it out of th"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_anything_starts(recipe, line, said, monkeypatch):
    monkeypatch.setattr(recipe_run, "follow", None)
    flags = ("--infoentropy-objective=focal", "--infoentropy-fused-linear")
    recipe.write_text(recipe.read_text().replace("iters: 1", line))
    with pytest.raises(ValueError, match=said):
        bench_recipe(recipe, {}, flags, losses=("focal, fused", "focal"))


def test_the_ranks_are_told_the_names_of_the_losses_whatever_is_in_them(recipe, monkeypatch):
    told = []
    monkeypatch.setattr(recipe_run, "follow", lambda run, words, environment: told.extend(words))
    flags = ("--infoentropy-objective=focal", "--infoentropy-fused-linear")
    monkeypatch.setattr(tempfile, "tempdir", str(recipe.parent))
    with pytest.raises(ValueError, match="the training ended before every loss had taken a step"):
        bench_recipe(recipe, {}, flags, losses=OURS)
    place = told.index("megatron_infoentropy.bench.recipe_run")
    assert json.loads(told[place + 3]) == list(OURS)


@pytest.mark.parametrize("schedule", [{}, {"gamma_schedule": "linear", "gamma_samples": 9}])
def test_our_losses_have_different_names(schedule):
    focal = InfoEntropyConfig("focal", fused_linear=True, **schedule)
    assert tuple(own_losses(focal)) == OURS
    plain = InfoEntropyConfig("cross_entropy", **schedule)
    assert tuple(own_losses(plain)) == ("cross entropy", "cross entropy, fused linear")


def test_losses_are_chosen_by_their_names():
    every = [
        RecipeLoss(name, "", None, None, reason=reason)
        for name, reason in (
            *(("infoentropy", ""), ("megatron unfused", "")),
            *(("megatron fused", "no GPU"), ("te", "not installed")),
        )
    ]
    assert choose([], every) == every
    assert choose(["megatron fused", "megatron unfused"], every) == every[1:3]
    with pytest.raises(ValueError, match="can be measured here: megatron fused: no GPU; te: not i"):
        choose(["te", "megatron fused"], every)
