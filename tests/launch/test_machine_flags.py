"""Flags that a machine asks for: which of Megatron's optional kernels it has decides."""

import pytest

from megatron_infoentropy.launch import recipe
from megatron_infoentropy.launch.recipe import FUSION_KERNEL, NO_FUSION_FLAG, machine_flags
from megatron_infoentropy.runtime.device import Device

GPU = Device("cuda", "nccl", 1)


@pytest.fixture
def installed(monkeypatch):
    """A set of packages, as if only those were there."""
    found = set()
    monkeypatch.setattr(recipe, "find_spec", lambda name: name if name in found else None)
    return found


def test_without_anything_the_layers_are_megatrons_own(installed):
    assert machine_flags(GPU, {}) == [*recipe.PLAIN_GPU_FLAGS, NO_FUSION_FLAG]


def test_transformer_engine_alone_leaves_the_output_layer_without_its_fusion(installed):
    installed.add("transformer_engine")
    assert machine_flags(GPU, {}) == [NO_FUSION_FLAG]
    assert machine_flags(GPU, {"transformer-impl": "transformer_engine"}) == [NO_FUSION_FLAG]


def test_with_apex_beside_it_nothing_is_turned_off(installed):
    installed.update({"transformer_engine", FUSION_KERNEL})
    assert machine_flags(GPU, {}) == []


def test_the_kernel_is_the_one_that_megatron_asks_for():
    from megatron.core.tensor_parallel import layers

    text = layers.__loader__.get_source(layers.__name__)
    assert f"import {FUSION_KERNEL}" in text
    assert "if config.gradient_accumulation_fusion and not _grad_accum_fusion_available" in text
