"""How texts are cut into windows: every token once, with the context that the stride promises."""

import numpy as np
import pytest

from megatron_infoentropy.evaluate.scoring import batches_of_similar_length, cut_windows

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
