"""One small case measured whole: nobody is missing, and counts are what the algorithms say."""

import re
from functools import partial
from itertools import product
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from close import assert_within
from launch import run_forked
from oracle import dense_statistics

from megatron_infoentropy.bench import losses, run
from megatron_infoentropy.bench.cases import Case, grid
from megatron_infoentropy.bench.losses import Truth, rehearse
from megatron_infoentropy.bench.providers import (
    Provider,
    Setting,
    Unavailable,
    in_place,
    ours,
    peers,
)
from megatron_infoentropy.bench.timing import (
    Clock,
    median_difference,
    peak_mib,
    prepare,
    ratio,
    spread,
    time_in_turn,
)
from megatron_infoentropy.runtime.device import Device

LOGITS_BYTES = 12 * 70 * 4


@pytest.fixture(scope="module")
def experiment(setting):
    return prepare(setting, repeats=2)


@pytest.fixture(scope="module")
def rows(experiment):
    return losses.measure_losses(experiment)


def test_every_provider_has_its_times_or_a_reason(rows, setting):
    everybody = [p.name for p in ours(setting) + peers()]
    assert sorted({row.provider for row in rows}) == sorted(everybody)
    for row in rows:
        assert (row.kind == "unavailable") == bool(row.reason)
    steps = {}
    for row in rows:
        if row.kind == "loss":
            steps.setdefault(row.provider, []).append(row.step)
            assert row.p20_ms <= row.median_ms <= row.p80_ms
    assert {"native", "native in place", "torch", "megatron unfused", "paper eager"} <= set(steps)
    assert set(map(tuple, steps.values())) == {("forward", "backward", "both")}


def test_bytes_are_those_the_problem_must_move(rows):
    forward, backward, both = (row for row in rows if row.provider == "native")
    moved = [row.bytes / LOGITS_BYTES for row in (forward, backward, both)]
    assert moved == [1, 2, 3]
    assert both.gb_per_s == pytest.approx(3 * LOGITS_BYTES / both.median_ms / 1e6)


def test_kernels_are_held_against_a_copy_of_the_same_logits(experiment):
    copy, *kernels = losses.measure_kernels(experiment)
    assert (copy.kind, copy.step, copy.bytes) == ("limit", "copy", 2 * LOGITS_BYTES)
    assert [(row.provider, row.step) for row in kernels] == [
        (backend, step)
        for backend in ("native", "reference")
        for step in ("statistics", "gradient", "gradient in place")
    ]
    for row in kernels:
        assert (row.kind, row.limit) == ("kernel", "copy")
        assert row.bytes == (1 if row.step == "statistics" else 2) * LOGITS_BYTES
        assert row.percent_of_limit == pytest.approx(100 * row.gb_per_s / copy.gb_per_s)


def test_an_output_layer_is_right_however_it_is_formed():
    hidden, weight, target = losses._linear_inputs(Case(40, 70), 8, torch.device("cpu"))
    for name, loss in losses.linear_losses(chunk_tokens=16).items():
        count = re.search(r"(\d+) % of", name)
        kept = torch.arange(40) % 10 < (int(count[1]) // 10 if count else 10)
        truth = [each.double().requires_grad_() for each in (hidden, weight)]
        ce, entropy, _ = dense_statistics((truth[0] @ truth[1].t())[kept], target[kept])
        weights = 1 + entropy.detach()
        expected = (weights * ce).sum() / weights.sum()
        leaves = [each.clone().requires_grad_() for each in (hidden, weight)]
        value = loss(*leaves, target)
        assert_within(value, expected, rtol=1e-6)
        gradients = zip(
            torch.autograd.grad(value, leaves), torch.autograd.grad(expected, truth), strict=True
        )
        for gradient, true in gradients:
            assert_within(gradient, true, atol=1e-5 * float(true.abs().max()))


def test_an_output_layer_needs_the_predicted_memory():
    tokens, hidden, vocabulary, chunk = 512, 32, 4096, 64
    case = Case(tokens, vocabulary)
    rows = losses.measure_linear(
        case, hidden, chunk, torch.device("cpu"), repeats=1, computes="output layer"
    )
    assert [row.provider for row in rows] == list(losses.linear_losses(chunk))
    gradients = (tokens + vocabulary) * hidden * 4
    for row, rows_of_logits in zip(rows[:3], (tokens, chunk, chunk), strict=True):
        predicted = (rows_of_logits * vocabulary * 4 + gradients) / 2**20
        slack = 200 * tokens / 2**20  # statistics, coefficients and their temporaries
        assert predicted <= row.peak_mib <= predicted + slack, row.provider
        assert row.median_ms > 0
    assert rows[4].peak_mib < rows[3].peak_mib < rows[2].peak_mib


def test_passes_take_turns_and_ratios_are_of_medians_in_the_same_run(clock):
    order, lengths = [], {"slow": [10, 20, 30], "fast": [1, 4, 2]}

    def steps(name):
        yield
        order.append(name)
        clock.tick(lengths[name][order.count(name) - 1])
        yield

    times = time_in_turn({name: partial(steps, name) for name in lengths}, clock, 3)
    assert order == ["slow", "fast"] * 3
    assert times == {name: [each] for name, each in lengths.items()}
    assert ratio(*lengths.values()) == (20 / 2, 5, 15)  # the repeats' own ratios: 10, 5, 15
    assert spread([5, 1, 2, 4, 3, 6]) == (3.5, 2, 5)


def test_grids_have_the_shapes_that_the_docs_name():
    shapes = ["2048 x 32000 float32", "2048 x 32000 bfloat16", "2048 x 32000 float32, TP 2"]
    assert [str(case) for case in grid("small")] == shapes
    shapes = ["8192 x 128256 bfloat16", "8192 x 151936 bfloat16"]
    assert [str(case) for case in grid("headline")] == shapes
    first, *others = map(str, grid("full"))
    assert first == shapes[0]  # which the targets of a file are judged at
    sizes = product((4096, 8192, 16384), (32000, 128256, 262144), ("bfloat16", "float32"))
    assert sorted([first, *others]) == sorted(f"{n} x {v} {dtype}" for n, v, dtype in sizes)


def test_an_interval_is_of_the_pairs_not_of_the_times():
    ours = [10.0, 200.0, 30.0, 47.0, 500.0]  # the machine had other things to do
    assert median_difference([time + 5 for time in ours], ours) == (5.0, 5.0, 5.0)
    low, middle, high = median_difference([11.0, 198.0, 33.0, 51.0, 505.0], ours)
    assert middle == 3.0
    assert low < 3.0 < high


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        (lambda x, y: torch.nn.functional.cross_entropy(x, y) * 1.1, "another number"),
        (lambda x, y: torch.nn.functional.cross_entropy(x, y) * float("nan"), "another number"),
        (lambda x, y: torch.nn.functional.cross_entropy(x.roll(1, 0).detach() * 0 + x, y)
         + x.sum() * 1e-2 - (x.sum() * 1e-2).detach(), "another number"),
        (lambda x, y: 1 / 0, "ZeroDivisionError"),
    ],
    ids=["loss", "nan", "gradient", "failure"],
)  # fmt: skip
def test_a_provider_that_is_wrong_or_fails_is_not_timed(experiment, wrong, reason):
    truth = Truth(experiment.logits, experiment.target, experiment.group)
    with pytest.raises(Unavailable, match=reason):
        rehearse(Provider("wrong", lambda setting: wrong), experiment, truth)


def test_memory_is_the_worst_moment():
    def run():
        first = torch.empty(1 << 20, dtype=torch.uint8)
        del first
        second = torch.empty(3 << 20, dtype=torch.uint8)
        del second

    assert peak_mib(run, torch.device("cpu")) == pytest.approx(3, abs=0.01)


def rows_of_two_ranks():
    case = Case(12, 70, tensor_parallel=2)
    setting = Setting(case, torch.device("cpu"), dist.group.WORLD, compiled=False)
    return losses.measure_losses(prepare(setting, repeats=1))


def test_collectives_are_counted_over_two_ranks():
    first, second = run_forked(rows_of_two_ranks, 2)
    assert [row.median_ms for row in first] == [row.median_ms for row in second]
    counted = {(row.provider, row.step): row for row in first if row.kind == "loss"}
    for name in ("native", in_place("native"), "reference"):
        forward, backward = counted[name, "forward"], counted[name, "backward"]
        assert (forward.collectives, forward.collective_bytes) == (1, 16 * 12)
        assert (backward.collectives, backward.collective_bytes) == (0, 0)
    two_steps = counted[f"{in_place('native')} (all_reduce)", "both"]
    assert (two_steps.collectives, two_steps.collective_bytes) == (2, (4 + 16) * 12)
    unfused = counted["megatron unfused", "both"]
    assert (unfused.collectives, unfused.collective_bytes) == (3, 3 * 4 * 12)
    assert {row.provider for row in first if "no tensor parallelism" in row.reason} >= {"torch"}


def test_a_case_for_more_gpus_than_there_are_is_listed():
    two_ranks = Case(8, 64, tensor_parallel=2)
    (row,) = run._measure(two_ranks, True, Device("cuda", "nccl", 1), repeats=1)
    assert (row.kind, row.reason) == ("unavailable", "it needs 2 GPUs, found 1")


@pytest.mark.gpu
def test_a_case_is_measured_on_a_gpu():
    rows = run.bench([Case(64, 4096, "bfloat16")], repeats=2, compiled=False)
    timed = {row.provider for row in rows if row.kind == "loss"}
    assert {"reference", "torch", "megatron unfused"} <= timed
    assert all(row.clock.startswith("CUDA events") for row in rows)


def test_on_a_gpu_the_cache_is_flushed_before_events_mark_the_steps(monkeypatch):
    """The clock's order of calls, on a machine without a GPU: everything of torch.cuda stood in."""
    cuda = mock.MagicMock()
    cuda.get_device_properties.return_value.L2_cache_size = 50
    monkeypatch.setattr(torch, "cuda", cuda)
    monkeypatch.setattr(torch, "empty", cuda.empty)
    clock = Clock(torch.device("cuda"))
    clock.start()
    clock.mark()
    cuda.launch()
    clock.mark()
    assert len(clock.read()) == 2
    called = [name for name, *_ in cuda.mock_calls]
    assert [name for name in called[called.index("synchronize") :] if name != "Event"] == [
        *("synchronize", "empty().zero_", "Event().record", "Event().record", "launch"),
        *("Event().record", "Event().synchronize", "Event().elapsed_time", "Event().elapsed_time"),
    ]
