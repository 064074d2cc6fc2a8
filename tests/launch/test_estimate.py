"""The dry run's arithmetic, against sums done by hand."""

from dataclasses import replace

import pytest
from small_shape import PLAIN

from megatron_infoentropy.launch.estimate import memory, parameters, stages, traffic

LINEAR = 4 * 8 * 8 + 3 * 8 * 16  # of one layer: q, k, v, out; gate, up, down
TOTAL = 4 * (LINEAR + 16) + 8 + 2 * 32 * 8
HIDDEN = 3 * 10 * 8 * 2  # bytes of one micro-batch's hidden states
# As published: the count of each shape.
PAPER = [
    (468_239_360, {"hidden_size": 1024, "ffn_hidden_size": 4096, "num_layers": 24}, 16, 64),
    (1_204_881_408, {"hidden_size": 2048, "ffn_hidden_size": 8192, "num_layers": 16}, 8, 256),
    (6_738_415_616, {"hidden_size": 4096, "ffn_hidden_size": 11008, "num_layers": 32}, 32, 128),
]


@pytest.mark.parametrize(("count", "sizes", "heads", "channels"), PAPER)
def test_the_papers_models_have_the_parameters_of_their_shapes(count, sizes, heads, channels):
    attention = {"num_attention_heads": heads, "num_query_groups": heads, "kv_channels": channels}
    assert parameters(replace(PLAIN, **sizes, **attention, vocab_size=32000)) == count


def test_a_tied_table_counts_once_but_is_held_by_both_ends_of_a_pipeline():
    tied = replace(PLAIN, untied=False)
    assert parameters(PLAIN) == TOTAL
    assert parameters(tied) == parameters(replace(tied, pipeline_parallel=2)) == TOTAL - 32 * 8
    held = stages(replace(tied, pipeline_parallel=4))
    layer = LINEAR + 16
    assert [stage.cut + stage.whole for stage in held] == [
        *(layer + 32 * 8, layer, layer, layer + 8 + 32 * 8),
    ]


def test_memory_without_any_cut():
    held = memory(PLAIN)
    assert (held.weights, held.gradients) == (2 * TOTAL, 4 * TOTAL)
    assert (held.optimizer_whole, held.optimizer_sharded) == (12 * TOTAL, 6 * TOTAL)
    assert held.activations == 4 * 1000
    assert held.logits_whole == 30 * 32 * 2
    assert held.logits_fused == 2 * 5 * 32 * 2
    assert held.total(PLAIN) == 12 * TOTAL + 4000 + 30 * 32 * 2
    plain = replace(PLAIN, distributed_optimizer=False, fused_linear=True)
    assert held.total(plain) == 18 * TOTAL + 4000 + 10 * 32 * 2


def test_tensor_parallel_ranks_share_matrices_and_logits_but_not_norms():
    held = memory(replace(PLAIN, tensor_parallel=2))
    assert held.weights == 2 * (4 * (LINEAR // 2 + 16) + 8 + 32 * 8)
    assert held.logits_whole == 30 * 16 * 2


def test_an_optimizer_of_fewer_bytes_is_sharded_like_any_other():
    held = memory(replace(PLAIN, optimizer_bytes=8))
    assert (held.optimizer_whole, held.optimizer_sharded) == (8 * TOTAL, 4 * TOTAL)


def test_fp8_copies_are_of_layers_only():
    assert memory(PLAIN).fp8_weights == 0
    assert memory(replace(PLAIN, fp8=True)).fp8_weights == 2 * 4 * LINEAR


def test_a_fused_chunk_is_never_more_than_there_are_tokens():
    held = memory(replace(PLAIN, chunk_tokens=4096))
    assert held.logits_fused == held.logits_whole


@pytest.mark.parametrize(
    ("changes", "bytes_kept"),
    [
        ({"recompute": "uniform"}, 4 * HIDDEN + 1000),
        ({"recompute": "uniform", "recompute_layers": 3}, 2 * HIDDEN + 3 * 1000),
        ({"recompute": "block", "recompute_layers": 3}, 3 * HIDDEN + 1000 + 1000),
        ({"recompute": "block", "recompute_layers": 9}, 4 * HIDDEN + 1000),
        (
            {"recompute": "uniform", "tensor_parallel": 2, "sequence_parallel": True},
            4 * HIDDEN // 2 + 1000,
        ),
        # Two micro-batches on their way through two stages of two layers, or one if there is one.
        ({"pipeline_parallel": 2}, 4 * 1000),
        ({"pipeline_parallel": 2, "global_batch_size": 6}, 2 * 1000),
        ({"pipeline_parallel": 2, "virtual_stages": 2}, 5 * 1000),
    ],
)
def test_activations_by_recomputation_and_pipeline(changes, bytes_kept):
    assert memory(replace(PLAIN, **changes)).activations == bytes_kept


def test_gradients_travel_once_a_step_as_a_ring_sends_them():
    reduced, gathered = 4 * TOTAL // 2, 2 * TOTAL // 2
    assert traffic(PLAIN).data_parallel == reduced + gathered
    assert traffic(replace(PLAIN, distributed_optimizer=False)).data_parallel == 2 * reduced
    assert traffic(replace(PLAIN, data_parallel=1)).data_parallel == 0


def test_hidden_states_travel_between_stages_with_every_micro_batch():
    assert traffic(PLAIN).pipeline_parallel == 0
    assert traffic(replace(PLAIN, pipeline_parallel=2)).pipeline_parallel == 2 * HIDDEN
    middle = replace(PLAIN, pipeline_parallel=4)
    assert traffic(middle).pipeline_parallel == 2 * 2 * HIDDEN
    assert traffic(replace(middle, tensor_parallel=2)).pipeline_parallel == 2 * 2 * HIDDEN
    scattered = replace(middle, tensor_parallel=2, sequence_parallel=True)
    assert traffic(scattered).pipeline_parallel == 2 * HIDDEN
