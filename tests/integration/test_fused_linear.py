"""The output processor with --infoentropy-fused-linear, and what the flag cannot go with.

Its gradients in the trainer are in test_gradient_oracle.py.
"""

from types import SimpleNamespace

import pytest
import torch
from close import assert_within

from megatron_infoentropy import InfoEntropyConfig, infoentropy_loss
from megatron_infoentropy.integration.arguments import check_megatron_args
from megatron_infoentropy.integration.output import OutputSettings, statistics_processor

S, B, H, V = 6, 2, 8, 40


def random_case():
    generator = torch.Generator().manual_seed(4)
    hidden = torch.randn(S, B, H, generator=generator)
    weight = torch.randn(V, H, generator=generator)
    return hidden, weight, torch.randint(0, V, (S, B), generator=generator)


def layer(weight, **changes):
    """What the processor relies on of a ColumnParallelLinear."""
    module = torch.nn.Module()
    module.weight = weight if weight is None else torch.nn.Parameter(weight)
    plain = {
        "bias": None,
        "disable_grad_reduce": False,
        "sequence_parallel": False,
        "gradient_accumulation_fusion": False,
    }
    for name, value in (plain | changes).items():
        setattr(module, name, value)
    return module


def process(output_layer, output_weight=None):
    hidden, _, target = random_case()
    settings = OutputSettings(InfoEntropyConfig(fused_linear=True), None, None)
    return statistics_processor(
        hidden_states=hidden,
        output_layer=output_layer,
        output_weight=output_weight,
        labels=target.T,
        loss_mask=None,
        runtime_gather_output=None,
        scale_logits=None,
        context=settings,
    )


def test_the_weight_is_used_only_after_what_waits_for_it_has_run():
    """With --overlap-param-gather a hook of the layer, which is not called, completes it."""
    _, weight, _ = random_case()
    output_layer = layer(torch.zeros_like(weight))

    def arrive(module, _inputs):
        module.weight.data.copy_(weight)

    output_layer.register_forward_pre_hook(arrive)
    assert_within(process(output_layer), process(layer(weight)))


def test_a_tied_layer_takes_the_weight_it_is_handed():
    _, weight, _ = random_case()
    assert_within(process(layer(None), output_weight=weight), process(layer(weight)))


@pytest.mark.parametrize("change", [{"bias": torch.zeros(V)}, {"disable_grad_reduce": True}])
def test_a_layer_that_does_more_is_refused(change):
    with pytest.raises(ValueError, match="output layer without bias whose input gradient is"):
        process(layer(random_case()[1], **change))


def megatron_args(**changes):
    plain = {"trust_remote_code": False, "fp16_lm_cross_entropy": False}
    return SimpleNamespace(**plain | changes)


CANNOT_BE_FUSED = (
    *("use_mup", "defer_embedding_wgrad_compute", "fp8_output_proj"),
    *("use_megatron_fsdp", "use_torch_fsdp2", "tensor_parallel_num_weight_shards"),
)


@pytest.mark.parametrize("flag", CANNOT_BE_FUSED)
def test_flags_that_need_the_layer_called_are_refused(flag):
    derived = {"tensor_parallel_num_weight_shards": {"gtp_weight_remat_size": 2}}
    args = megatron_args(**derived.get(flag, {flag: True}))
    check_megatron_args(args, InfoEntropyConfig())
    with pytest.raises(ValueError, match=f"cannot go with --{flag.replace('_', '-')}"):
        check_megatron_args(args, InfoEntropyConfig(fused_linear=True))


def test_the_functions_of_logits_refuse_the_setting():
    hidden, weight, target = random_case()
    with pytest.raises(ValueError, match="use linear_infoentropy_loss, or the trainer"):
        infoentropy_loss(hidden @ weight.T, target, InfoEntropyConfig(fused_linear=True))
