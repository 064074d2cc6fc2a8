"""The loss on one CUDA device: right, and without a stall. Skipped by name where there is none."""

import pytest
import torch
from close import assert_within, assert_within_bf16_ulp
from oracle import dense_statistics

from megatron_infoentropy import infoentropy_loss, vocab_parallel_statistics

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("v", [7, 1000, 50257, 128256])
def test_statistics_and_gradient_equal_float64(v, dtype):
    generator = torch.Generator("cuda").manual_seed(v)
    logits = (torch.randn(37, v, device="cuda", generator=generator) * 3).to(dtype)
    target = torch.randint(0, v, (37,), device="cuda", generator=generator)
    ours, truth = logits.clone().requires_grad_(), logits.double().requires_grad_()
    got, expected = vocab_parallel_statistics(ours, target), dense_statistics(truth, target)
    for part, value in zip(got, expected, strict=True):
        assert_within(part, value, atol=1e-5, rtol=2.4e-7)
    got.cross_entropy.sum().backward()
    expected[0].sum().backward()
    if dtype == torch.bfloat16:
        assert_within_bf16_ulp(ours.grad.cpu(), truth.grad.cpu(), ulps=1.01)
    else:
        assert_within(ours.grad, truth.grad, atol=1e-6, rtol=1e-3)


def test_forward_and_backward_never_wait_for_the_device():
    logits = torch.randn(64, 5000, device="cuda", requires_grad=True)
    target = torch.randint(0, 5000, (64,), device="cuda")
    mask = torch.ones(64, device="cuda")
    infoentropy_loss(logits, target, loss_mask=mask).backward()  # warm up
    torch.cuda.set_sync_debug_mode("error")
    try:
        infoentropy_loss(logits, target, loss_mask=mask).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_target_outside_the_vocabulary_is_loud():
    got = vocab_parallel_statistics(
        torch.randn(3, 10, device="cuda"), torch.tensor([1, 10, -1], device="cuda")
    )
    assert got.cross_entropy.isnan().tolist() == [False, True, True]
