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

HIGH, MEDIUM, LOW = range(3)


def buckets(counts: np.ndarray) -> list[int]:
    bucket_of_band = np.repeat([HIGH, MEDIUM, LOW], [16, 3, 1])
    return bucket_of_band[frequency_bands(counts)].tolist()


def test_buckets_and_deciles_are_unions_of_all_bands():
    for names in (BUCKETS, DECILES):
        covered = np.concatenate([np.arange(BANDS)[BANDS_OF[name]] for name in names])
        assert covered.tolist() == list(range(BANDS))


@pytest.mark.parametrize(
    ("counts", "expected"),
    [
        ([50, 30, 10, 5, 5, 0], [HIGH, HIGH, MEDIUM, MEDIUM, LOW, LOW]),
        # A token that crosses a cut is of the more frequent bucket: 0, 79, 92, 96, 98 before them.
        ([79, 2, 13, 2, 4], [HIGH, LOW, HIGH, LOW, MEDIUM]),
        ([16, 3, 1], [HIGH, MEDIUM, LOW]),  # one that starts at a cut is of the rarer one
        # 0.8 + 0.15 is not 0.95 in floating point: counts are compared as integers.
        ([160 * 10**15, 30 * 10**15, 10 * 10**15], [HIGH, MEDIUM, LOW]),
        ([0, 7, 0], [LOW, HIGH, LOW]),  # never seen in training
    ],
)
def test_buckets_cover_80_15_and_5_percent(counts, expected):
    assert buckets(np.array(counts)) == expected


def test_every_token_follows_the_rule_and_equal_counts_go_by_token_id():
    counts = np.random.default_rng(0).integers(0, 30, size=2000)
    expected, before, total = {}, 0, int(counts.sum())
    for token in sorted(range(2000), key=lambda token: (-counts[token], token)):
        expected[token] = min(before * 20 // total, 19)
        before += int(counts[token])
    assert frequency_bands(counts).tolist() == [expected[token] for token in range(2000)]


def test_the_share_of_each_bucket_is_near_its_name_on_a_zipf_distribution():
    counts = (1e6 / np.arange(1, 5001)).astype(np.int64)
    sizes = describe_bands(BUCKETS, counts, frequency_bands(counts))
    shares = [sizes[name]["training_share"] for name in BUCKETS]
    assert shares == pytest.approx([0.80, 0.15, 0.05], abs=0.001)
    assert sum(size["vocabulary"] for size in sizes.values()) == 5000
    assert sizes["high"]["vocabulary"] < sizes["low"]["vocabulary"]
    tenths = describe_bands(DECILES, counts, frequency_bands(counts))
    assert sum(size["training_share"] for size in tenths.values()) == pytest.approx(1)
    assert tenths["10"]["training_share"] == pytest.approx(0.1, abs=0.001)


@pytest.mark.parametrize("counts", [np.zeros(4, int), np.array([3, -1]), np.ones((2, 2), int)])
def test_counts_that_are_no_counts_are_refused(counts):
    with pytest.raises(ValueError, match="token counts must be"):
        frequency_bands(counts)


def test_a_table_of_another_vocabulary_is_refused(tmp_path):
    np.save(tmp_path / "counts.npy", np.array([[1, 2, 3], [10, 0, 5]]))
    assert read_token_counts(tmp_path / "counts.npy", 3).sum(axis=0).tolist() == [11, 2, 8]
    with pytest.raises(ValueError, match=r"expected \[domains, 4\]"):
        read_token_counts(tmp_path / "counts.npy", 4)
