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


@pytest.mark.parametrize("in_front", [1, 3, 16])
@pytest.mark.parametrize("stride", [1, 3, 8, 15, 16])
def test_every_token_is_predicted_once_and_no_window_is_longer_than_the_context(stride, in_front):
    lengths = np.array([1, 15, 16, 17, 33, 64])
    windows = cut_windows(lengths, 16, stride, in_front)
    seen = [np.zeros(length, dtype=int) for length in lengths]
    for text, start, length in zip(windows.text, windows.start, windows.length, strict=True):
        assert length >= 1
        seen[text][start : start + length] += 1
    assert all((times == 1).all() for times in seen)
    assert windows.positions.max() == 16
    assert (windows.context <= windows.start + in_front).all()
    later = windows.start > 0
    assert (windows.context[later] == 16 - stride + 1).all()


def test_windows_without_overlap_are_as_few_as_can_be():
    assert len(cut_windows(np.array([1, 15, 16, 17, 33, 64]), 16, 16)) == 1 + 1 + 1 + 2 + 3 + 4


def test_batches_hold_every_window_and_stay_within_the_budget():
    windows = cut_windows(np.arange(1, 60), 16, 12)
    batches = list(batches_of_similar_length(windows, 40))
    assert sorted(np.concatenate(batches)) == list(range(len(windows)))
    assert all(len(batch) * windows.positions[batch].max() <= 40 for batch in batches)
    assert windows.positions[batches[0][0]] == 16


def test_a_batch_reads_its_context_scores_the_rest_and_is_padded_to_the_right():
    tokens = np.array([11, 12, 13, 14, 15, 16, 21])  # two texts, of 6 and of 1
    windows = cut_windows(np.array([6, 1]), 4, 2)
    batch = make_batch(tokens, np.array([0, 6]), windows, np.array([0, 1, 2]), [EOD])
    assert batch.inputs.tolist() == [[EOD, 11, 12, 13], [12, 13, 14, 15], [EOD] * 4]
    no = IGNORED
    assert batch.target.tolist() == [[11, 12, 13, 14], [no, no, 15, 16], [21, no, no, no]]
    assert batch.place.tolist() == [0, 1, 2, 3, 4, 5, 6]
    assert tokens[batch.place].tolist() == batch.target[batch.target != no].tolist()


def test_a_window_reads_what_is_left_of_two_tokens_in_front_of_the_text():
    tokens = np.array([11, 12, 13, 14, 15, 16])
    windows = cut_windows(np.array([6]), 4, 1, 2)
    batch = make_batch(tokens, np.array([0]), windows, np.arange(len(windows)), [1, 2])
    assert batch.inputs.tolist() == [
        [1, 2, 11, 12],
        [2, 11, 12, 13],
        [11, 12, 13, 14],
        [12, 13, 14, 15],
    ]
    no = IGNORED
    assert batch.target.tolist() == [[no, 11, 12, 13], *([no, no, no, t] for t in (14, 15, 16))]
    assert batch.place.tolist() == [0, 1, 2, 3, 4, 5]
