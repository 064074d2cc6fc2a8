"""Percentiles, shares and histograms of entropies and weights: over all ranks, in every writer."""

import io
import json
import math
import re
import sys
from collections import defaultdict
from contextlib import redirect_stdout
from itertools import accumulate
from unittest import mock

import plain_run
import pytest
import torch
import torch.distributed as dist
from launch import TINY_TRAINING, run_forked, run_trainer
from megatron.core import parallel_state, tensor_parallel
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer import TransformerConfig
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_infoentropy import TokenStatistics
from megatron_infoentropy.integration.observe import Histogram, TokenObserver, announce_size


def test_quantiles_and_shares_are_right_to_a_bin():
    values = torch.rand(10_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 7
    mask = (torch.arange(10_000) % 3 > 0).double()
    histogram = Histogram(0.0, 8.0, 64)
    counts = histogram.count(values, mask)
    kept = values[mask > 0]
    assert counts.sum() == len(kept)
    for share in (0.1, 0.5, 0.9, 1.0):
        assert histogram.quantile(counts, share) == pytest.approx(
            float(kept.quantile(share)), abs=8 / 64
        )
    assert histogram.share_above(counts, 3.3) == pytest.approx(
        float((kept > 3.3).double().mean()), abs=0.01
    )


def test_values_beyond_the_bins_are_counted_at_the_ends_and_nan_nowhere():
    histogram = Histogram(-1.0, 1.0, 4)
    values = torch.tensor([-9.0, -1.0, 0.0, 1.0, math.inf, -math.inf, math.nan]).double()
    assert histogram.count(values, torch.ones(7).double()).tolist() == [3, 0, 1, 2]
    empty = torch.zeros(4).double()
    assert histogram.quantile(empty, 0.5) == -1.0
    assert histogram.share_above(empty, 0.0) == 0.0
    assert math.isnan(histogram.share_above(empty, math.nan))  # a diverged run goes on being logged
    assert histogram.share_above(histogram.count(values[:2], torch.ones(2).double()), -5.0) == 1.0


def make_tokens(rank):
    generator = torch.Generator().manual_seed(rank)
    ce = torch.rand(3, 50, generator=generator) * 5
    entropy = torch.rand(3, 50, generator=generator) * math.log(500)
    mask = (torch.rand(3, 50, generator=generator) > 0.1 + 0.4 * rank).float()
    return TokenStatistics(ce, entropy, ce, ce > 1), (1 + entropy) ** 2, mask


def report_on_rank():
    observer = TokenObserver(500)
    first, second = make_tokens(dist.get_rank()), make_tokens(dist.get_rank() + 2)
    observer.add(*first, torch.tensor([-3.0, 2.0]))
    observer.end_step(1)
    for _ in range(2):  # the second time is Megatron's, which looks for a cause
        observer.add(*second, torch.tensor([1.0, 2.0]))
        observer.end_step(2)
    found = observer.report(dist.group.WORLD, 2.0)
    assert observer.report(dist.group.WORLD, 2.5) is None  # each report starts anew
    observer.add(*first, torch.tensor([-3.0, 2.0]))
    observer.end_step(3)
    later = observer.report(dist.group.WORLD, 5.0)
    assert later["tokens/s"] == 2 * 150 / 3.0
    return found


def report_of_weights(*weights):
    weight = torch.tensor([weights])
    observer = TokenObserver(500)
    mask = torch.ones_like(weight)
    observer.add(TokenStatistics(*[mask] * 4), weight, mask, torch.tensor([1.0, 1.0]))
    assert observer.end_step(1)
    return observer._read(observer._counts, 1.0)


@pytest.mark.parametrize(
    ("weights", "least", "most"),
    [
        *(((weight,), 0.9 * weight, 1.1 * weight) for weight in (1e-8, 1e-4, 15921.0, 1e10)),
        ((1.0, 1.0, 1.0), 0.999, 1.1),
        ((0.0, 0.0), 0.0, 1e-9),
    ],
)
def test_weights_of_every_objective_are_in_range(weights, least, most):
    found = report_of_weights(*weights)
    assert least <= found["weight p50"] <= found["weight max"] <= most
    if weights[0] == 1:
        assert found["weight p50"] == pytest.approx(1.0)
        assert found["share of tokens above mean weight"] == pytest.approx(0.5)


def test_a_report_is_over_all_tokens_of_all_ranks():
    every = [make_tokens(index) for index in range(4)]
    keep = torch.cat([mask.flatten() for *_, mask in every]) > 0
    ce = torch.cat([s.cross_entropy.flatten() for s, *_ in every])[keep].double()
    entropy = torch.cat([s.entropy.flatten() for s, *_ in every])[keep].double()
    weight = torch.cat([w.flatten() for _, w, _ in every])[keep].double()
    for found in run_forked(report_on_rank, 2):
        assert found["perplexity"] == pytest.approx(float(ce.mean().exp()), rel=1e-6)
        for percent in (10, 50, 90):
            expected = float(entropy.quantile(percent / 100))
            assert found[f"entropy p{percent}"] == pytest.approx(expected, abs=0.1)
        assert float(entropy.max()) <= found["entropy max"] <= float(entropy.max()) + 0.1
        assert found["weight p50"] == pytest.approx(float(weight.median()), rel=0.1)
        assert float(weight.max()) <= found["weight max"] <= float(weight.max()) * 1.1
        share = float((weight > weight.mean()).double().mean())
        assert found["share of tokens above mean weight"] == pytest.approx(share, abs=0.03)
        assert found["tokens/s"] == 4 * 150 / 2.0
        assert found["objective"] == -0.5


MODEL = {"num_layers": 2, "hidden_size": 16, "num_attention_heads": 2, "num_moe_experts": 4}
MODEL["add_bias_linear"] = False  # with it experts are not split over tensor-parallel ranks
LAYOUTS = (
    {"expert_model_parallel_size": 1},
    {"expert_model_parallel_size": 2},
    {"tensor_model_parallel_size": 2},
    {"tensor_model_parallel_size": 2, "expert_tensor_parallel_size": 1},
    {"tensor_model_parallel_size": 2, "expert_tensor_parallel_size": 1}
    | {"expert_model_parallel_size": 2},
    {"pipeline_model_parallel_size": 2},
)


def sizes_on_rank(is_tied):
    """What is announced in every layout, and the parameters of the rank."""
    said, own = io.StringIO(), []
    for layout in LAYOUTS:
        parallel_state.initialize_model_parallel(**layout)
        tensor_parallel.model_parallel_cuda_manual_seed(0)
        config = TransformerConfig(
            **MODEL, **layout, use_cpu_initialization=True, pipeline_dtype=torch.float32
        )
        model = GPTModel(
            config,
            get_gpt_layer_local_spec(num_experts=4),
            *(64, 8),
            pre_process=parallel_state.is_pipeline_first_stage(),
            post_process=parallel_state.is_pipeline_last_stage(),
            share_embeddings_and_output_weights=is_tied,
        )
        with redirect_stdout(said):
            announce_size([model])
        own.append(sum(parameter.numel() for parameter in model.parameters()))
        parallel_state.destroy_model_parallel()
    return said.getvalue(), own


@pytest.mark.parametrize("is_tied", [False, True])
def test_a_model_has_as_many_parameters_in_every_layout(is_tied):
    (said, own), (silence, _) = run_forked(sizes_on_rank, 2, is_tied)
    assert said == f"model parameters: {own[0]}\n" * len(LAYOUTS)
    assert silence == ""
    assert max(own[1:]) < own[0]  # the others are spread


def train_beside_wandb(path):
    """Write what the last rank, which has the writers, logs to a stand-in for W&B."""
    sys.modules["wandb"] = wandb = mock.MagicMock()
    wandb.Histogram = lambda np_histogram: [each.tolist() for each in np_histogram]
    plain_run.main()
    if wandb.log.called:
        path.write_text(json.dumps([c.args for c in wandb.log.call_args_list], default=float))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(folder of a training with both writers, what its last rank, which holds them, printed)."""
    folder = tmp_path_factory.mktemp("observed")
    flags = [
        *(*TINY_TRAINING, "--global-batch-size=8", "--train-iters=6"),
        *("--log-interval=3", "--infoentropy-gamma=0", "--infoentropy-gamma-schedule=linear"),
        *("--infoentropy-gamma-end=2", "--infoentropy-gamma-samples=32"),
        *(f"--tensorboard-dir={folder}/events", "--wandb-project=p", "--wandb-exp-name=n"),
        *(f"--wandb-save-dir={folder}", "--infoentropy-histogram-interval=6"),
    ]
    first = run_trainer(2, train_beside_wandb, (folder / "wandb.json",), flags, folder)
    return folder, first + (folder / "rank1.log").read_text()


def test_the_trainer_reports_at_the_log_interval(run):
    _, log = run
    reports = re.findall(r"InfoEntropy at iteration +(\d+) \| perplexity: ([\d.]+) \|.*", log)
    assert [int(iteration) for iteration, _ in reports] == [3, 6]
    shown = numbers_of(log, "iteration        6/       6")
    assert float(reports[1][1]) == pytest.approx(math.exp(shown["cross entropy"]), rel=1e-4)
    # gamma at 24, 32 and 40 consumed samples of 32: 1.5, 2 and 2.
    assert shown["gamma"] == pytest.approx(5.5 / 3, rel=1e-5)
    assert 0 < shown["alpha"] < 1
    ours = numbers_of(log, "InfoEntropy at iteration        6")
    lowest, highest = (1 + ours["entropy p10"]) ** 1.5, (1 + ours["entropy p90"]) ** 2
    assert lowest < ours["weight p50"] < highest, "of another gamma than the training's"


def numbers_of(log, start):
    """{name: number} of the line that has `start`."""
    line = next(line for line in log.splitlines() if start in line)
    found = re.findall(r"\| ([^|:]+): +([-+.\dE]+) (?=\|)", line)
    return {name.strip(): float(value) for name, value in found}


def read_tensorboard(folder):
    """({name: {step: value}}, {name: {step: (counts, upper edges)}})"""
    events = EventAccumulator(str(folder / "events"), size_guidance={"histograms": 0})
    events.Reload()
    tags = events.Tags()
    scalars = {name: {e.step: e.value for e in events.Scalars(name)} for name in tags["scalars"]}
    histograms = {}
    for name in tags["histograms"]:
        drawn = {event.step: event.histogram_value for event in events.Histograms(name)}
        histograms[name] = {step: (x.bucket, x.bucket_limit) for step, x in drawn.items()}
    return scalars, histograms


def read_wandb(folder):
    """The same of what W&B was given, which drops numbers of an earlier step than the last one."""
    scalars, histograms, last = defaultdict(dict), defaultdict(dict), 0
    for values, step in json.loads((folder / "wandb.json").read_text()):
        assert step >= last
        last = step
        for name, value in values.items():
            if isinstance(value, list):
                counts, edges = value
                histograms[name][step] = counts, edges[1:]
            else:
                scalars[name][step] = value
    return scalars, histograms


PERCENTILES = ("entropy p10", "entropy p50", "entropy p90", "entropy max", "weight p50")
REPORTED = (
    *("perplexity", *PERCENTILES, "weight p99", "weight max", "tokens/s"),
    *("share of tokens above mean weight", "model TFLOP/s per rank"),
)


@pytest.mark.parametrize("read", [read_tensorboard, read_wandb])
def test_writers_get_what_the_log_shows(read, run):
    folder, log = run
    scalars, histograms = read(folder)
    for end in (3, 6):
        shown = numbers_of(log, f"iteration {end:8d}/       6")
        for name in ("objective", "cross entropy", "entropy", "weight", "alpha", "gamma"):
            # Megatron writes every step and prints the mean of an interval's.
            mean = sum(scalars[name][step] for step in range(end - 2, end + 1)) / 3
            assert mean == pytest.approx(shown[name], rel=1e-5, abs=1e-6), name
        reported = numbers_of(log, f"InfoEntropy at iteration {end:8d}")
        assert set(reported) == set(REPORTED)
        for name, value in reported.items():
            written = scalars[f"infoentropy/{name}"]
            assert set(written) == {3, 6}
            assert written[end] == pytest.approx(value, rel=1e-5), name
    tokens = 3 * 8 * 16  # of an interval
    reported = numbers_of(log, "InfoEntropy at iteration        6")
    for name, half in (("entropy", "entropy p50"), ("log2 weight", "weight p50")):
        ((step, (counts, edges)),) = histograms[f"infoentropy/{name}"].items()
        assert (step, sum(counts)) == (6, tokens)
        assert len(counts) == len(edges)
        median = math.log2(reported[half]) if name == "log2 weight" else reported[half]
        middle = next(i for i, count in enumerate(accumulate(counts)) if count >= tokens / 2)
        assert edges[middle - 1] - 1e-4 <= median <= edges[middle] + 1e-4
