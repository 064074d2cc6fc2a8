"""Percentiles, shares and histograms of entropies and weights: right, over all ranks."""

import math
import re

import plain_run
import pytest
import torch
import torch.distributed as dist
from launch import TINY_MODEL, run_trainer
from ranks import run_ranks

from megatron_infoentropy import TokenStatistics
from megatron_infoentropy.integration.histogram import Histogram


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
    from megatron_infoentropy.integration.observe import TokenObserver

    observer = TokenObserver(500)
    first, second = make_tokens(dist.get_rank()), make_tokens(dist.get_rank() + 2)
    observer.add(*first)
    observer.add(*second)
    found = observer.report(dist.group.WORLD, 2.0)
    drawn = Recorder()
    observer.draw(drawn, None, 7)
    assert observer.report(dist.group.WORLD, 1.0) is None  # each report starts anew
    return found, drawn.calls


class Recorder:
    def __init__(self):
        self.calls = []

    def add_histogram_raw(self, name, **values):
        self.calls.append((name, values))


def test_a_report_is_over_all_tokens_of_all_ranks():
    every = [make_tokens(index) for index in range(4)]
    keep = torch.cat([mask.flatten() for *_, mask in every]) > 0
    ce = torch.cat([s.cross_entropy.flatten() for s, *_ in every])[keep].double()
    entropy = torch.cat([s.entropy.flatten() for s, *_ in every])[keep].double()
    weight = torch.cat([w.flatten() for _, w, _ in every])[keep].double()
    for found, drawn in run_ranks(report_on_rank, 2):
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
        assert [name for name, _ in drawn] == ["infoentropy/entropy", "infoentropy/log2 weight"]
        for _, values in drawn:
            assert sum(values["bucket_counts"]) == values["num"] == keep.sum()
            assert len(values["bucket_limits"]) == len(values["bucket_counts"])


def test_the_trainer_reports_at_the_log_interval(tmp_path):
    flags = [
        *TINY_MODEL,
        *("--mock-data", "--tokenizer-type=NullTokenizer", "--vocab-size=256"),
        *("--micro-batch-size=2", "--global-batch-size=8", "--train-iters=6", "--lr=1e-3"),
        *("--log-interval=3", "--infoentropy-gamma=0", "--infoentropy-gamma-schedule=linear"),
        *("--infoentropy-gamma-end=2", "--infoentropy-gamma-samples=32"),
    ]
    log = run_trainer(2, plain_run.main, (), flags, tmp_path)
    # The last rank holds Megatron's writers.
    last = (tmp_path / "rank1.log").read_text()
    reports = re.findall(r"InfoEntropy at iteration +(\d+) \| perplexity: ([\d.]+) \|.*", last)
    assert [int(iteration) for iteration, _ in reports] == [3, 6]
    line = next(x for x in (log + last).splitlines() if "iteration        6/       6" in x)
    cross_entropy = float(re.search(r"cross entropy: ([\d.E+-]+)", line)[1])
    assert float(reports[1][1]) == pytest.approx(math.exp(cross_entropy), rel=1e-4)
    assert "share of tokens above mean weight" in last
    assert "model TFLOP/s per rank" in last
    # gamma at 24, 32 and 40 consumed samples of 32: 1.5, 2 and 2.
    assert float(re.search(r"gamma: ([\d.E+-]+)", line)[1]) == pytest.approx(5.5 / 3, rel=1e-5)
    assert 0 < float(re.search(r"alpha: ([\d.E+-]+)", line)[1]) < 1
