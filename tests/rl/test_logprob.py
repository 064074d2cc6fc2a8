"""Log-probability and entropy, and their gradient, equal dense float64; gloo, one and two ranks."""

import pytest
import rl_numbers as numbers
import torch
import torch.distributed as dist
from close import assert_within, assert_within_bf16_ulp
from ranks import run_ranks

from megatron_infoentropy.rl import linear_logprob_and_entropy, logprob_and_entropy

HALF = [[True] * 5 + [False] * 3, [False, True] * 4]
OPTIONS = {
    "alone": {},
    "temperature": {"temperature": 0.6},
    "temperature a token": {"temperature": torch.linspace(0.9, 2, 16).view(2, 8)},
    "padded": {"vocab_size": numbers.VOCAB},
    "constant entropy": {"entropy_gradient": False},
    "loss mask": {"loss_mask": torch.tensor(HALF)},
    "kept": {"keep_mask": True},
    "kept and left out": {"keep_mask": True, "loss_mask": torch.tensor(HALF)},
    "in place": {"inplace_backward": True},
    "all_reduce": {"collective": "all_reduce"},
}


def run(name, kind, dtype, world):
    """On a rank: (log-probability, entropy, this rank's gradient)."""
    rank, options = dist.get_rank(), dict(OPTIONS[name])
    whole = numbers.logits_of(kind, dtype)
    if options.get("keep_mask"):
        options["keep_mask"] = numbers.kept(whole).chunk(world, -1)[rank].contiguous()
    leaf = whole.chunk(world, -1)[rank].contiguous().requires_grad_()
    logits = leaf * 1
    logprob, entropy = logprob_and_entropy(
        logits, numbers.target_of(), group=dist.group.WORLD, **options
    )
    if not entropy.requires_grad:
        assert not options.get("entropy_gradient", True)
    by_logprob, by_entropy = numbers.upstream()
    (by_logprob * logprob + by_entropy * entropy).sum().backward()
    return logprob.detach(), entropy.detach(), leaf.grad


def truth(name, kind, dtype):
    options = dict(OPTIONS[name])
    logits = numbers.logits_of(kind, dtype)
    keep = numbers.with_target(numbers.kept(logits)) if "keep_mask" in options else None
    return numbers.truth_of(
        logits,
        temperature=options.get("temperature", 1.0),
        vocab_size=options.get("vocab_size", numbers.PADDED),
        keep=keep,
        take_part=options.get("loss_mask"),
        entropy_gradient=options.get("entropy_gradient", True),
    )


def without_gradient(name, kind, dtype):
    """Where it is exactly 0: entries of -inf, padding, tokens that are left out."""
    nothing = numbers.logits_of(kind, dtype) == -torch.inf
    nothing[..., OPTIONS[name].get("vocab_size", numbers.PADDED) :] = True
    if "loss_mask" in OPTIONS[name]:
        nothing |= ~OPTIONS[name]["loss_mask"].unsqueeze(-1)
    return nothing


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("kind", numbers.KINDS)
@pytest.mark.parametrize("name", OPTIONS)
def test_values_and_gradients_equal_float64(name, kind, dtype, world):
    expected = truth(name, kind, dtype)
    ranks = run_ranks(run, world, name, kind, dtype, world)
    # Logits of 200 are rounded once more where a temperature divides them.
    rounding = 3e-5 if name.startswith("temperature") and kind == "shifted" else 1e-6
    for logprob, entropy, _ in ranks:
        assert logprob.dtype == entropy.dtype == torch.float32
        assert_within(logprob, expected.logprob, rtol=1e-6, atol=rounding)
        assert_within(entropy, expected.entropy, rtol=1e-6, atol=rounding)
    gradient = torch.cat([gradient for *_, gradient in ranks], -1)
    assert (gradient[without_gradient(name, kind, dtype)] == 0).all()
    if dtype == torch.float32:
        assert_within(gradient, expected.gradient, rtol=2e-6, atol=rounding)
    else:
        assert_within_bf16_ulp(gradient, expected.gradient)


def run_linear(world, dtype):
    rank = dist.get_rank()
    hidden, weight = linear_inputs(dtype)
    weight = weight.chunk(world)[rank].contiguous().requires_grad_()
    hidden = hidden.requires_grad_()
    logprob, entropy = linear_logprob_and_entropy(
        hidden,
        weight,
        numbers.target_of(),
        group=dist.group.WORLD,
        temperature=0.6,
        vocab_size=numbers.VOCAB,
        loss_mask=torch.tensor(HALF),
        chunk_tokens=5,
    )
    by_logprob, by_entropy = numbers.upstream()
    (by_logprob * logprob + by_entropy * entropy).sum().backward()
    return logprob.detach(), entropy.detach(), hidden.grad, weight.grad


def linear_inputs(dtype):
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(numbers.BATCH, numbers.SEQUENCE, 16, generator=generator)
    weight = torch.randn(numbers.PADDED, 16, generator=generator)
    return hidden.to(dtype), weight.to(dtype)


@pytest.mark.parametrize("world", [1, 2])
def test_hidden_states_and_weight_equal_float64(world):
    hidden, weight = (x.double().requires_grad_() for x in linear_inputs(torch.float64))
    expected = numbers.truth_of(
        (hidden @ weight.T).detach(),
        temperature=0.6,
        vocab_size=numbers.VOCAB,
        take_part=torch.tensor(HALF),
    )
    (hidden @ weight.T).backward(expected.gradient)
    ranks = run_ranks(run_linear, world, world, torch.float32)
    for logprob, entropy, by_hidden, _ in ranks:
        assert_within(logprob, expected.logprob, rtol=1e-6, atol=5e-6)
        assert_within(entropy, expected.entropy, rtol=1e-6, atol=5e-6)
        assert_within(by_hidden, hidden.grad, rtol=1e-5, atol=1e-5)
    by_weight = torch.cat([by_weight for *_, by_weight in ranks])
    assert_within(by_weight, weight.grad, rtol=1e-5, atol=1e-5)


def test_without_entropy_there_is_none():
    logits, target = numbers.logits_of("plain", torch.float32), numbers.target_of()
    assert logprob_and_entropy(logits, target, with_entropy=False)[1] is None
    keep = numbers.kept(logits)
    logprob, none = logprob_and_entropy(logits, target, keep_mask=keep, with_entropy=False)
    assert none is None
    assert torch.equal(logprob, logprob_and_entropy(logits, target, keep_mask=keep)[0])


def test_masks_of_another_shape_are_refused():
    logits, target = numbers.logits_of("plain", torch.float32), numbers.target_of()
    with pytest.raises(ValueError, match="loss_mask must have the target's shape"):
        logprob_and_entropy(logits, target, loss_mask=torch.ones(3))
    with pytest.raises(ValueError, match="expected a bool keep_mask in the shape of the logits"):
        logprob_and_entropy(logits, target, keep_mask=torch.ones_like(logits))
