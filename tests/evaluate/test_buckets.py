"""The rule that cuts the vocabulary into bands, and the buckets and deciles they add up to."""

import numpy as np
import pytest

from megatron_infoentropy.evaluate.tally import (
    BANDS,
    BANDS_OF,
    BUCKETS,
    DECILES,
    describe_bands,
    frequency_bands,
    read_token_counts,
)


def test_buckets_and_deciles_are_unions_of_all_bands():
    for names, share in ((BUCKETS, [16, 3, 1]), (DECILES, [2] * 10)):
        covered = [np.arange(BANDS)[BANDS_OF[name]] for name in names]
        assert list(map(len, covered)) == share
        assert np.concatenate(covered).tolist() == list(range(BANDS))


@pytest.mark.parametrize(
    "counts",
    [
        [50, 30, 10, 5, 5, 0],
        [79, 2, 13, 2, 4],  # tokens that cross a cut
        [16, 3, 1],  # that start at one
        # 0.8 + 0.15 is not 0.95 in floating point: counts are compared as integers.
        [160 * 10**15, 30 * 10**15, 10 * 10**15],
        [0, 7, 0],  # never seen in training
        np.random.default_rng(0).integers(0, 30, size=2000).tolist(),
    ],
    ids=lambda counts: str(counts[:6]),
)
def test_every_token_follows_the_rule_and_equal_counts_go_by_token_id(counts):
    expected, before, total = {}, 0, sum(counts)
    for token in sorted(range(len(counts)), key=lambda token: (-counts[token], token)):
        expected[token] = min(before * 20 // total, 19)
        before += counts[token]
    found = frequency_bands(np.array(counts)).tolist()
    assert found == [expected[token] for token in range(len(counts))]


def test_the_share_of_each_bucket_is_near_its_name_on_a_zipf_distribution():
    counts = (1e6 / np.arange(1, 5001)).astype(np.int64)
    for names, shares in ((BUCKETS, [0.80, 0.15, 0.05]), (DECILES, [0.1] * 10)):
        sizes = describe_bands(names, counts, frequency_bands(counts)).values()
        found = [size["training_share"] for size in sizes]
        assert found[-1] == pytest.approx(shares[-1], abs=0.001)
        assert found == pytest.approx(shares, abs=0.012)
        assert sum(found) == pytest.approx(1)
        assert sum(size["vocabulary"] for size in sizes) == 5000


@pytest.mark.parametrize("counts", [np.zeros(4, int), np.array([3, -1]), np.ones((2, 2), int)])
def test_counts_that_are_no_counts_are_refused(counts):
    with pytest.raises(ValueError, match="token counts must be"):
        frequency_bands(counts)


def test_a_table_of_another_vocabulary_is_refused(tmp_path):
    np.save(tmp_path / "counts.npy", np.array([[1, 2, 3], [10, 0, 5]]))
    assert read_token_counts(tmp_path / "counts.npy", 3).sum(axis=0).tolist() == [11, 2, 8]
    with pytest.raises(ValueError, match=r"expected \[domains, 4\]"):
        read_token_counts(tmp_path / "counts.npy", 4)
