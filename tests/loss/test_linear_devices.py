"""The fused linear on a GPU; the host looks at no number but that of the masked tokens to skip."""

import pytest
import torch
from close import assert_within, assert_within_bf16_ulp
from linear_cases import BOTH, fused_loss, random_inputs

N, H, V, CHUNK = 96, 16, 264, 20
UNSEEN = {"chunk_tokens": CHUNK, "skip_masked": False}


def make_case(device, dtype=torch.bfloat16):
    return random_inputs(N, H, V, dtype=dtype, device=device)


@BOTH
def test_no_number_is_looked_at(function):
    """Tensors on "meta" have none: a look, or a shape that depends on one, would raise."""
    hidden, weight, target = make_case("meta")
    function(hidden, weight, target, backend="reference", **UNSEEN).backward()
    assert (hidden.grad.shape, weight.grad.dtype) == (hidden.shape, torch.bfloat16)


@pytest.mark.gpu
@BOTH
def test_a_gpu_gives_what_a_cpu_gives_without_a_look_at_numbers(function):
    expected = make_case("cpu", torch.float64)
    function(*expected, backend="reference", **UNSEEN).backward()
    hidden, weight, target = make_case("cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        function(hidden, weight, target, **UNSEEN).backward()
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
        (fused_loss(hidden, weight, target, chunk_tokens=CHUNK) * scale).backward()
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
    function(hidden, weight, target, into_main_grad=True, chunk_tokens=CHUNK).backward()
    assert (weight.main_grad != weight.main_grad.bfloat16().float()).any()
