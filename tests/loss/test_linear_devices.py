"""The fused linear never looks at numbers on the host, and keeps its promises on a GPU."""

import pytest
import torch
from close import assert_within, assert_within_bf16_ulp

from megatron_infoentropy import InfoEntropyConfig
from megatron_infoentropy.loss.linear import (
    linear_infoentropy_loss,
    linear_vocab_parallel_statistics,
)

N, H, V, CHUNK = 96, 16, 264, 20


def statistics_objective(hidden, weight, target, backend="auto", **options):
    got = linear_vocab_parallel_statistics(
        hidden, weight, target, backend=backend, chunk_tokens=CHUNK, **options
    )
    return ((1 + got.entropy.detach()) * got.cross_entropy).mean()


def fused_loss(hidden, weight, target, backend="auto", **options):
    config = InfoEntropyConfig(backend=backend, chunk_tokens=CHUNK)
    mask = torch.ones_like(target)
    return linear_infoentropy_loss(hidden, weight, target, mask, config, **options)


BOTH = pytest.mark.parametrize("function", [statistics_objective, fused_loss])


def make_case(device, dtype=torch.bfloat16):
    generator = torch.Generator().manual_seed(6)
    hidden = torch.randn(N, H, generator=generator).to(device, dtype).requires_grad_()
    weight = torch.randn(V, H, generator=generator).to(device, dtype).requires_grad_()
    return hidden, weight, torch.randint(0, V, (N,), generator=generator).to(device)


@BOTH
def test_no_number_is_looked_at(function):
    """Tensors on "meta" have none: a look, or a shape that depends on one, would raise."""
    hidden, weight, target = make_case("meta")
    function(hidden, weight, target, "reference").backward()
    assert (hidden.grad.shape, weight.grad.dtype) == (hidden.shape, torch.bfloat16)


@pytest.mark.gpu
@BOTH
def test_a_gpu_gives_what_a_cpu_gives_without_a_look_at_numbers(function):
    expected = make_case("cpu", torch.float64)
    function(*expected, "reference").backward()
    hidden, weight, target = make_case("cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        function(hidden, weight, target).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for got, truth in ((hidden.grad, expected[0].grad), (weight.grad, expected[1].grad)):
        assert_within(got, truth, atol=2e-2 * truth.abs().max().item())


@pytest.mark.gpu
def test_the_factor_of_a_loss_is_not_rounded_to_16_bits_on_a_gpu():
    """1 + 2^-9 is 1 in bf16, which a GPU makes of a factor without dimensions."""
    factor = 1 + 2**-9
    gradients = []
    for scale in (1.0, factor):
        hidden, weight, target = make_case("cuda")
        (fused_loss(hidden, weight, target) * scale).backward()
        gradients.append((hidden.grad, weight.grad))
    for once, scaled in zip(*gradients, strict=True):
        assert not torch.equal(scaled, once)
        assert_within_bf16_ulp(scaled.cpu(), once.cpu().double() * factor, ulps=1.01)


@pytest.mark.gpu
@BOTH
def test_main_grad_on_a_gpu_is_summed_in_fp32(function):
    """cuBLAS multiplies bf16 and adds in fp32: no chunk's part is rounded to bf16 on its way."""
    hidden, weight, target = make_case("cuda")
    weight.main_grad = torch.zeros(V, H, device="cuda")
    function(hidden, weight, target, into_main_grad=True).backward()
    assert (weight.main_grad != weight.main_grad.bfloat16().float()).any()
