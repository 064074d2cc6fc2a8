"""The paired bootstrap: covers a known difference, is exact for none, refuses what has no pairs."""

import dataclasses

import numpy as np
import pytest

from megatron_infoentropy.evaluate.bootstrap import FEWEST_DOCUMENTS, paired_differences
from megatron_infoentropy.evaluate.buckets import BANDS
from megatron_infoentropy.evaluate.errors import DifferentDataError
from megatron_infoentropy.evaluate.evaluation import DocumentSums, Evaluation
from megatron_infoentropy.evaluate.summary import summarise_documents


def evaluation(seed: int, shift: float = 0.0, noise: float = 0.0, documents: int = 120):
    """Documents of very different difficulty in two domains; `shift` nats on every low token."""
    generator = np.random.default_rng(0)  # lengths and difficulty: the same for every seed
    tokens = generator.integers(1, 40, size=(documents, 3)) * np.array([8, 2, 1])
    difficulty = generator.normal(4, 1.5, size=(documents, 1)) + np.array([-1, 0, 2])
    own = np.random.default_rng(seed).normal(0, noise, size=(documents, 3))
    per_token = difficulty + own + shift * np.array([0, 0, 1])
    domain = (np.arange(documents) >= documents // 3).astype(np.int64)
    in_bands = np.zeros((2, documents, BANDS))
    in_bands[:, :, [0, 16, 19]] = tokens, per_token * tokens  # one band of each bucket
    sums = DocumentSums(
        domain, np.arange(documents), in_bands[0].astype(np.int64), in_bands[1], 0 * in_bands[1]
    )
    summary = {"data": {"fingerprint": "same"}, **summarise_documents(sums, ["prose", "code"])}
    return Evaluation(summary, sums)


def test_identical_evaluations_differ_by_exactly_nothing():
    result = paired_differences([(evaluation(1), evaluation(1))])
    for interval in (result.total, *result.buckets.values(), *result.domains.values()):
        assert (interval.difference, interval.low, interval.high) == (0, 0, 0)
        assert not interval.excludes_zero


def test_a_known_difference_is_covered_and_found_only_where_it_is():
    result = paired_differences([(evaluation(1, -0.3, 0.2), evaluation(2, 0.0, 0.2))])
    low = result.buckets["low"]
    assert low.low < -0.3 < low.high < 0
    assert low.excludes_zero
    assert result.buckets["high"].low < 0 < result.buckets["high"].high


def test_the_observed_difference_is_the_difference_of_nats_per_token():
    first, second = evaluation(1, 0.1, 0.2), evaluation(2, 0, 0.2)
    result = paired_differences([(first, second)])
    for mine, numbers in ((result.domains, "domains"), (result.buckets, "buckets")):
        for name, interval in mine.items():
            gap = (
                first.summary[numbers][name]["nats_per_token"]
                - second.summary[numbers][name]["nats_per_token"]
            )
            assert interval.difference == pytest.approx(gap, abs=1e-12)


def test_intervals_cover_zero_in_about_95_of_100_trials_without_a_difference():
    trials = 200
    covered = 0
    for trial in range(trials):
        pair = evaluation(2 * trial, 0, 0.3), evaluation(2 * trial + 1, 0, 0.3)
        covered += not paired_differences([pair], resamples=2000).total.excludes_zero
    assert 0.89 <= covered / trials <= 0.99


def test_pairing_cancels_the_difficulty_of_documents():
    # Documents differ by 1.5 nats, the models by 0.02 with noise 0.01: unpaired this is invisible.
    result = paired_differences([(evaluation(1, 0.02, 0.01), evaluation(2, 0, 0.01))])
    assert result.buckets["low"].high - result.buckets["low"].low < 0.02


def test_several_seeds_give_the_mean_of_their_differences():
    pairs = [(evaluation(s, 0.1 * s, 0.1), evaluation(s + 9, 0, 0.1)) for s in (1, 2, 3)]
    alone = [paired_differences([pair]).buckets["low"].difference for pair in pairs]
    together = paired_differences(pairs).buckets["low"]
    assert together.difference == pytest.approx(np.mean(alone))
    assert together.low < 0.2 < together.high


def test_the_same_seed_gives_the_same_interval_and_blocks_do_not_matter(monkeypatch):
    pair = evaluation(1, 0, 0.2), evaluation(2, 0, 0.2)
    first = paired_differences([pair])
    assert paired_differences([pair]) == first
    assert paired_differences([pair], seed=1) != first
    monkeypatch.setattr("megatron_infoentropy.evaluate.bootstrap._BLOCK", 1000)
    assert paired_differences([pair]).total.low == pytest.approx(first.total.low)


def test_too_few_documents_give_a_difference_without_an_interval():
    few = FEWEST_DOCUMENTS - 1
    result = paired_differences([(evaluation(1, 0.5, 0, few), evaluation(2, 0, 0, few))])
    assert result.buckets["low"].difference == pytest.approx(0.5)
    assert (result.buckets["low"].low, result.buckets["low"].high) == (None, None)
    assert not result.buckets["low"].excludes_zero


def test_a_bucket_without_tokens_has_no_difference():
    def without_low(one: Evaluation) -> Evaluation:
        tokens, ce = one.documents.tokens.copy(), one.documents.ce.copy()
        tokens[:, 19], ce[:, 19] = 0, 0
        return Evaluation(one.summary, dataclasses.replace(one.documents, tokens=tokens, ce=ce))

    result = paired_differences([(without_low(evaluation(1)), without_low(evaluation(2)))])
    assert result.buckets["low"].difference is None
    assert result.buckets["high"].difference == 0


def test_evaluations_of_different_data_are_refused():
    first, second = evaluation(1), evaluation(2)
    second.summary["data"]["fingerprint"] = "other"
    with pytest.raises(DifferentDataError, match="evaluate both on the same data"):
        paired_differences([(first, second)])
    with pytest.raises(ValueError, match="2000 resamples"):
        paired_differences([(first, first)], resamples=100)
