"""The error bounds up to the largest vocabularies in use, and what no vocabulary may change."""

import functools

import pytest
import torch
from close import assert_within, assert_within_bf16_ulp
from oracle import dense_statistics
from test_backends import assert_statistics_keep_their_promise

from megatron_infoentropy import vocab_parallel_statistics

# Llama, GPT-2, Falcon-like, GPT-4, Llama 3, DeepSeek, Qwen (two), Llama 4, Gemma: odd ones too.
VOCABULARIES = [32000, 50264, 100277, 128256, 129920, 151936, 152064, 202048, 256000, 262144]


@functools.cache  # every backend is held against the same
def hard_rows(v, dtype):
    """As at initialisation; as trained; far below and above 0; one logit at +3 among -15."""
    generator = torch.Generator().manual_seed(v)
    logits = torch.randn(6, v, generator=generator)
    logits[1] = -(torch.rand(v, generator=generator).log().abs() ** 1.5) * 3
    logits[2] = logits[2] * 4 - 95
    logits[3] = logits[3] * 4 + 500
    logits[4] = -15.0
    target = torch.randint(0, v, (6,), generator=generator)
    logits[4, v // 3] = 3.0
    logits[5, target[5]] = logits[5].max() + 12
    logits = logits.to(dtype)
    return logits, target, dense_statistics(logits, target)


@pytest.mark.parametrize("v", VOCABULARIES)
def test_statistics_keep_their_promise_for_every_vocabulary_in_use(backend, v):
    for dtype in (torch.bfloat16, torch.float32)[: 2 if v in (50264, 151936, 262144) else 1]:
        logits, target, truth = hard_rows(v, dtype)
        got = vocab_parallel_statistics(logits, target, backend=backend)
        assert_statistics_keep_their_promise(got, logits, target, truth)


@pytest.mark.parametrize("v", [50257, 262144])
def test_bf16_gradient_with_the_entropy_term_is_within_an_ulp(backend, v):
    """... plus 1e-6 |A| p, since p (A + B d) is a difference."""
    logits, target, _ = hard_rows(v, torch.bfloat16)
    upstream = torch.randn(2, 6, generator=torch.Generator().manual_seed(0)).double()
    ours, truth = logits.clone().requires_grad_(), logits.double().requires_grad_()
    got = vocab_parallel_statistics(ours, target, backend=backend)
    torch.autograd.backward(got[:2], list(upstream.float()))
    ce, entropy, _ = dense_statistics(truth, target)
    torch.autograd.backward([ce, entropy], list(upstream))
    p = truth.detach().softmax(-1)
    distance = (truth.detach() - truth.detach().amax(-1, keepdim=True)) * p
    mean = -distance.sum(-1)
    a = (upstream[0].abs() + upstream[1].abs() * mean).unsqueeze(-1)
    slack = 1e-6 * (a * p + upstream[1].abs().unsqueeze(-1) * distance.abs())
    low, high = truth.grad - slack, truth.grad + slack
    nearest = ours.grad.double().clamp(low, high)
    assert_within_bf16_ulp(ours.grad, nearest, ulps=1.0)


def test_bf16_gradient_is_the_fp32_one_rounded_once_whatever_the_upstream_gradient(backend):
    """1.0 and 0.01: 99.9 % are the float32 result, rounded; none is more than an ulp from it."""
    logits, target, _ = hard_rows(50257, torch.bfloat16)
    for upstream in (1.0, 0.01):
        narrow, wide = logits.clone().requires_grad_(), logits.float().requires_grad_()
        for leaf in (narrow, wide):
            got = vocab_parallel_statistics(leaf, target, backend=backend)
            (got.cross_entropy * upstream).sum().backward()
        rounded = wide.grad.to(torch.bfloat16)
        assert (narrow.grad == rounded).double().mean() >= 0.999
        assert_within_bf16_ulp(narrow.grad, rounded)


def test_the_gradient_of_a_row_sums_to_zero(backend):
    logits, target, _ = hard_rows(50257, torch.float32)
    leaf = logits.clone().requires_grad_()
    got = vocab_parallel_statistics(leaf, target, backend=backend)
    (got.cross_entropy + 0.5 * got.entropy).sum().backward()
    assert_within(leaf.grad.double().sum(-1), torch.zeros(6), atol=5e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_more_than_two_to_the_31_elements_apart(backend, dtype):
    """Offsets are 64 bits. The memory between the rows is never touched, so it costs nothing."""
    stride, v = 2**30 + 24, 1500
    memory = torch.empty(2 * stride + v, dtype=dtype)
    far = memory.as_strided((3, v), (stride, 1))
    near = (torch.randn(3, v, generator=torch.Generator().manual_seed(0)) * 3).to(dtype)
    far.copy_(near)
    target = torch.tensor([0, 700, v - 1])
    gradients = []
    for leaf in (far.requires_grad_(), near.requires_grad_()):
        got = vocab_parallel_statistics(leaf, target, backend=backend)
        (gradient,) = torch.autograd.grad(got.cross_entropy.sum(), leaf)
        gradients.append(gradient)
    assert torch.equal(*gradients)


@pytest.mark.parametrize("gap", [1.0, 5.0, 20.0, 60.0])
def test_entropy_of_two_logits_is_exact_relative_to_itself(backend, gap):
    """H is as good relative to 1 - p_max, which is all it is made of for a confident token."""
    logits = torch.full((1, 4096), -torch.inf)
    logits[0, 5], logits[0, 4000] = 0.25, 0.25 - gap
    got = vocab_parallel_statistics(logits, torch.tensor([5]), backend=backend)
    ratio = torch.tensor(-gap, dtype=torch.float64).exp()
    ce, entropy = ratio.log1p(), ratio.log1p() + gap * ratio / (1 + ratio)
    rtol = 3e-7 + 1.2e-7 * gap  # the exponent is rounded to fp32
    assert_within(got.cross_entropy, ce.unsqueeze(0), rtol=rtol)
    assert_within(got.entropy, entropy.unsqueeze(0), rtol=rtol)
