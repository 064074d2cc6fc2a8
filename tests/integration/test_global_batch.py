"""The global batch's weight: summed as Megatron sums tokens, and never left unused."""

import math
from types import SimpleNamespace

import pytest
import torch
from megatron.core.distributed.data_parallel_base import _BaseDataParallel
from megatron.core.distributed.distributed_data_parallel import DistributedDataParallel

from megatron_infoentropy.integration import step


class Chunk:
    scale = None

    def scale_gradients(self, factor):
        self.scale = float(factor)


@pytest.fixture
def summed(monkeypatch):
    """Groups that were summed over, one of them of two ranks, without any rank."""
    groups = []

    def all_reduce(total, group):
        groups.append(group)
        total.mul_(2 if group == "data with weight shards" else 1)

    monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
    monkeypatch.setattr(step, "finalize_model_grads", lambda *_, **__: None)
    return groups


@pytest.mark.parametrize(
    ("more", "data"),
    [
        ({}, "data"),
        ({"dp_cp_gtp_remat": None}, "data"),
        ({"dp_cp_gtp_remat": "data with weight shards"}, "data with weight shards"),
    ],
)
def test_weights_are_summed_over_every_rank_that_has_tokens(summed, more, data):
    chunk, weight = Chunk(), step.GlobalBatchWeight()
    for part in (1.0, 3.0):
        weight.add(torch.tensor(part))
    groups = SimpleNamespace(pp="pipeline", dp_cp="data", **more)
    weight.finalize_model_grads([chunk], torch.tensor(7), pg_collection=groups)
    assert summed == ["pipeline", data]
    assert chunk.scale == (0.25 if data == "data" else 0.125)


def test_losses_are_divided_by_what_the_gradients_are_multiplied_with(summed):
    chunk, weight = Chunk(), step.GlobalBatchWeight(tokens=3000)
    assert weight.unit == 4096
    weight.add(torch.tensor(8.0))
    weight.finalize_model_grads([chunk], pg_collection=SimpleNamespace(pp=None, dp_cp=None))
    assert chunk.scale == 512


@pytest.mark.parametrize("total", [0.0, 1e-40, math.nan])
def test_gradients_without_a_weight_stay_finite_and_nan_is_seen(summed, total):
    chunk, weight = Chunk(), step.GlobalBatchWeight(tokens=2**30)
    weight.add(torch.tensor(total))
    weight.finalize_model_grads([chunk], pg_collection=SimpleNamespace(pp=None, dp_cp=None))
    assert math.isnan(chunk.scale) == math.isnan(total)
    assert not math.isinf(chunk.scale)


def test_a_wrapper_that_does_not_scale_gradients_is_refused(summed):
    class Wrapper(_BaseDataParallel):
        def __init__(self):
            torch.nn.Module.__init__(self)

    with pytest.raises(ValueError, match="which Wrapper does not do; use 'paper' or 'none'"):
        step.GlobalBatchWeight().finalize_model_grads([Wrapper()])
    assert DistributedDataParallel.scale_gradients is not _BaseDataParallel.scale_gradients
