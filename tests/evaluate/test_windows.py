"""How texts are cut into windows: every token once, with the context that the stride promises."""

import numpy as np
import pytest
from token_folder import EOD

from megatron_infoentropy.evaluate.scoring import (
    IGNORED,
    batches_of_similar_length,
    cut_windows,
    make_batch,
)

LENGTHS = (1, 15, 16, 17, 33, 64)


@pytest.mark.parametrize("in_front", [1, 3, 16])
@pytest.mark.parametrize("stride", [1, 3, 8, 15, 16])
def test_every_token_is_predicted_once_and_no_window_is_longer_than_the_context(stride, in_front):
    windows = cut_windows(LENGTHS, 16, stride, in_front)
    times = np.zeros(sum(LENGTHS) + in_front * len(LENGTHS), dtype=int)
    for window in windows:
        times[window.first : window.end] += 1
    every = [number for n in LENGTHS for number in (*[0] * in_front, *[1] * n)]
    assert times.tolist() == every
    assert max(window.positions for window in windows) == 16
    starts = {0, *np.cumsum(np.array(LENGTHS) + in_front).tolist()}
    for window in windows:
        context = in_front if window.begin in starts else 16 - stride + 1
        assert window.first - window.begin == context


def test_windows_without_overlap_are_as_few_as_can_be():
    assert len(cut_windows(LENGTHS, 16, 16)) == 1 + 1 + 1 + 2 + 3 + 4


def test_batches_hold_every_window_and_stay_within_the_budget():
    windows = cut_windows(range(1, 60), 16, 12)
    batches = list(batches_of_similar_length(windows, 40))
    assert {window for batch in batches for window in batch} == set(windows)
    assert sum(map(len, batches)) == len(windows)
    assert all(len(batch) * batch[0].positions <= 40 for batch in batches)
    longest_first = [window.positions for batch in batches for window in batch]
    assert longest_first == sorted(longest_first, reverse=True)


def test_a_batch_reads_its_context_scores_the_rest_and_is_padded_to_the_right():
    stream = np.array([EOD, 11, 12, 13, 14, 15, 16, EOD, 21])  # two texts, of 6 and of 1
    inputs, target = make_batch(stream, cut_windows([6, 1], 4, 2), EOD)
    assert inputs.tolist() == [[EOD, 11, 12, 13], [12, 13, 14, 15], [EOD] * 4]
    no = IGNORED
    assert target.tolist() == [[11, 12, 13, 14], [no, no, 15, 16], [21, no, no, no]]


def test_a_window_reads_what_is_left_of_two_tokens_in_front_of_the_text():
    stream = np.array([1, 2, 11, 12, 13, 14, 15, 16])
    inputs, target = make_batch(stream, cut_windows([6], 4, 1, 2), 2)
    assert inputs.tolist() == [
        [1, 2, 11, 12],
        [2, 11, 12, 13],
        [11, 12, 13, 14],
        [12, 13, 14, 15],
    ]
    no = IGNORED
    assert target.tolist() == [[no, 11, 12, 13], *([no, no, no, t] for t in (14, 15, 16))]
