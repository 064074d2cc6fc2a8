"""The fused linear and loss equal dense float64: values and gradients by both inputs, on ranks."""

from unittest import mock

import pytest
import torch
import torch.distributed as dist
from close import assert_within
from dense import dense_loss, dense_results
from ranks import run_ranks

from megatron_infoentropy import InfoEntropyConfig
from megatron_infoentropy.loss.linear import (
    linear_infoentropy_loss,
    linear_vocab_parallel_statistics,
)

S, B, H, V = 12, 3, 8, 40  # sequence, batch, hidden, padded vocabulary; divide by 1, 2, 4 ranks
TRUE_SIZE = 33  # of 4 shards the last holds 3 entries and 7 columns of padding
CHUNKS = (1, 5, 7, 18, 1000)  # of 36 tokens: none but 18 divides, one is larger
LAYOUTS = pytest.mark.parametrize(  # ranks, whether hidden states are split over them, how joined
    ("world", "sequence_parallel", "collective"),
    [
        (1, False, "gather"),
        (2, False, "all_reduce"),
        (2, True, "gather"),
        (4, False, "gather"),
        (4, True, "all_reduce"),
    ],
)
EVERYTHING = {
    "softcap": 3.0,
    "temperature": torch.linspace(0.5, 2, S * B, dtype=torch.float64).view(S, B),
    "uniform_cross_entropy": True,
    "sum_p_squared": True,
}


def make_case(data_rank=0, dtype=torch.float64, sequence=S):
    generator = torch.Generator().manual_seed(20 + data_rank)
    hidden = torch.randn(sequence, B, H, generator=generator, dtype=torch.float64).to(dtype)
    target = torch.randint(0, TRUE_SIZE, (sequence, B), generator=generator)
    target[::5, 0] = -100
    mask = (torch.rand(sequence, B, generator=generator) > 0.2 + 0.3 * data_rank).double()
    weight = torch.randn(V, H, generator=torch.Generator().manual_seed(19), dtype=torch.float64)
    return hidden, weight.to(dtype), target, mask


def upstream():
    """Other gradients for every token and result, negative ones and zeros too."""
    generator = torch.Generator().manual_seed(3)
    return torch.randn(5, S, B, generator=generator, dtype=torch.float64).clamp_min(-1) * 2


def shard_of(hidden, weight, group, sequence_parallel):
    """What this rank holds of both, as leaves."""
    world, rank = (1, 0) if group is None else (group.size(), group.rank())
    weight = weight.chunk(world)[rank].clone().requires_grad_()
    if sequence_parallel:
        hidden = hidden.chunk(world)[rank]
    return hidden.clone().requires_grad_(), weight


def whole_hidden_gradients(parts, sequence_parallel):
    """The gradient by all hidden states, once for every rank that claims to have it."""
    return [torch.cat(parts)] if sequence_parallel else parts


def on_ranks(function, world, *arguments):
    """[what every rank returns]; one rank alone has no group."""
    if world == 1:
        return [function(*arguments, None)]
    return run_ranks(in_world, world, function, *arguments)


def in_world(function, *arguments):
    return function(*arguments, dist.group.WORLD)


def statistics_on_rank(chunks, sequence_parallel, collective, options, group):
    results = []
    for chunk in chunks:
        hidden, weight, target, _ = make_case()
        hidden, weight = shard_of(hidden, weight, group, sequence_parallel)
        got = linear_vocab_parallel_statistics(
            hidden,
            weight,
            target,
            group=group,
            vocab_size=TRUE_SIZE,
            chunk_tokens=chunk,
            sequence_parallel=sequence_parallel,
            collective=collective,
            backend="reference",
            **options,
        )
        parts = [part for part in got if part is not None and part.dtype.is_floating_point]
        (torch.stack(parts) * upstream()[: len(parts)]).sum().backward()
        results.append((torch.stack(parts).detach(), hidden.grad, weight.grad))
    return results


@pytest.mark.parametrize("options", [{}, EVERYTHING], ids=["plain", "everything"])
@LAYOUTS
def test_statistics_and_gradients_equal_dense_float64(
    world, sequence_parallel, collective, options
):
    hidden, weight, target, _ = make_case()
    hidden.requires_grad_(), weight.requires_grad_()
    logits = hidden @ weight[:TRUE_SIZE].T
    meant = {name: options[name] for name in ("softcap", "temperature") if name in options}
    truth = torch.stack(dense_results(logits, target, **meant)[: 5 if options else 3])
    (truth * upstream()[: len(truth)]).sum().backward()
    found = on_ranks(statistics_on_rank, world, CHUNKS, sequence_parallel, collective, options)
    for of_ranks in zip(*found, strict=True):  # chunk by chunk
        values, by_hidden, by_weight = zip(*of_ranks, strict=True)
        for value in values:
            assert_within(value, truth, atol=1e-12)
        assert_within(torch.cat(by_weight), weight.grad, atol=1e-12)
        for gradient in whole_hidden_gradients(by_hidden, sequence_parallel):
            assert_within(gradient, hidden.grad, atol=1e-12)


def fp32_on_rank(autocast, sequence_parallel, detach_weight):
    group = dist.group.WORLD
    hidden, weight, target, mask = make_case(dtype=torch.float32)
    hidden, weight = shard_of(hidden, weight, group, sequence_parallel)
    config = InfoEntropyConfig(detach_weight=detach_weight, chunk_tokens=7)
    options = {"group": group, "sequence_parallel": sequence_parallel}
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        loss = linear_infoentropy_loss(hidden, weight, target, config, loss_mask=mask, **options)
        loss.backward()
    return loss.detach(), hidden.grad, weight.grad


@pytest.mark.parametrize("sequence_parallel", [False, True])
@pytest.mark.parametrize("detach_weight", [True, False], ids=["detached", "attached"])
def test_autocast_reaches_no_product_forward_or_backward(sequence_parallel, detach_weight):
    """One in bf16 would spoil the gradient, and send two dtypes into one collective."""
    plain = run_ranks(fp32_on_rank, 2, False, sequence_parallel, detach_weight)
    mixed = run_ranks(fp32_on_rank, 2, True, sequence_parallel, detach_weight)
    for of_plain, of_mixed in zip(plain, mixed, strict=True):
        for one, other in zip(of_plain, of_mixed, strict=True):
            assert torch.equal(one, other)


def loss_on_rank(chunks, sequence_parallel, settings, factor, group):
    results = []
    for chunk in chunks:
        hidden, weight, target, mask = make_case()
        hidden, weight = shard_of(hidden, weight, group, sequence_parallel)
        loss = linear_infoentropy_loss(
            hidden,
            weight,
            target,
            InfoEntropyConfig(backend="reference", chunk_tokens=chunk, **settings),
            group=group,
            loss_mask=mask,
            vocab_size=TRUE_SIZE,
            sequence_parallel=sequence_parallel,
        )
        (loss * factor).backward()
        results.append((loss.detach(), hidden.grad, weight.grad))
    return results


COMPARING = {"objective": "custom", "weighting": "test_weighting:above_median"}


@pytest.mark.parametrize(
    "settings",
    [{"gamma": 2.0}, {"gamma": 2.0, "detach_weight": False}, {"objective": "focal"}, COMPARING],
    ids=["detached", "attached", "focal", "comparing"],
)
@LAYOUTS
def test_loss_and_gradients_equal_dense_float64(world, sequence_parallel, collective, settings):
    """`factor` stands for what a caller does to the loss: gradient scaling, accumulation.

    A weight that compares tokens sees all of them whatever the chunks.
    """
    hidden, weight, target, mask = make_case()
    hidden.requires_grad_(), weight.requires_grad_()
    logits = hidden @ weight[:TRUE_SIZE].T
    truth = dense_loss([(logits, target, mask)], InfoEntropyConfig(**settings))
    (truth * -0.3).backward()
    settings = settings | {"collective": collective}
    found = on_ranks(loss_on_rank, world, CHUNKS, sequence_parallel, settings, -0.3)
    for of_ranks in zip(*found, strict=True):
        losses, by_hidden, by_weight = zip(*of_ranks, strict=True)
        for loss in losses:
            assert torch.equal(loss, losses[0])
            assert_within(loss, truth, rtol=1e-12)
        assert_within(torch.cat(by_weight), weight.grad, atol=1e-13)
        for gradient in whole_hidden_gradients(by_hidden, sequence_parallel):
            assert_within(gradient, hidden.grad, atol=1e-13)


def empty_on_rank(sequence_parallel, group):
    hidden, weight, target, _ = make_case(sequence=0)
    results = []
    for function in (linear_vocab_parallel_statistics, linear_infoentropy_loss):
        leaves = shard_of(hidden, weight, group, False)
        got = function(*leaves, target, group=group, sequence_parallel=sequence_parallel)
        loss = got if function is linear_infoentropy_loss else got.cross_entropy.sum()
        loss.backward()
        results += [loss.detach(), *(leaf.grad for leaf in leaves)]
    return results


@pytest.mark.parametrize(("world", "sequence_parallel"), [(1, False), (2, False), (2, True)])
def test_no_tokens_at_all_give_zero_and_zero_gradients(world, sequence_parallel):
    for results in on_ranks(empty_on_rank, world, sequence_parallel):
        for result in results:
            assert torch.equal(result, torch.zeros_like(result))


def test_ignored_and_masked_tokens_have_a_gradient_of_exactly_zero_even_beside_nan():
    hidden, weight, target, mask = make_case()
    mask[3] = 0
    hidden[3], hidden[0, 0] = torch.nan, torch.inf
    target[0, 0] = -100
    hidden.requires_grad_(), weight.requires_grad_()
    config = InfoEntropyConfig(chunk_tokens=5)
    linear_infoentropy_loss(hidden, weight, target, config, loss_mask=mask).backward()
    assert hidden.grad.isfinite().all()
    assert torch.equal(hidden.grad[3], torch.zeros(B, H, dtype=torch.float64))


def masked_on_rank(sequence_parallel, share):
    """[(results, gradients, rows of logits)] of the fused functions, masked rows skipped or not."""
    group = dist.group.WORLD
    results = []
    for skip in (True, False):
        hidden, weight, target, _ = make_case(sequence=12)
        kept = torch.arange(target.numel()).view(target.shape) % 7 < share
        target = target.masked_fill(~kept, -100)
        for settings in ({}, {"detach_weight": False}, {"objective": "eslm"}, None):
            h, w = shard_of(hidden, weight, group, sequence_parallel)
            options = {"group": group, "vocab_size": TRUE_SIZE}
            options["sequence_parallel"] = sequence_parallel
            with mock.patch.object(torch, "mm", wraps=torch.mm) as product:
                if settings is None:
                    statistics = linear_vocab_parallel_statistics(
                        h, w, target, chunk_tokens=4, skip_masked=skip, **options
                    )
                    values = torch.stack(statistics[:3])
                else:
                    config = InfoEntropyConfig(chunk_tokens=4, skip_masked=skip, **settings)
                    values = linear_infoentropy_loss(h, w, target, config, **options)
                made = [call.kwargs["out"] for call in product.call_args_list if call.kwargs]
                rows = sum(len(logits) for logits in made if logits.shape[1] == len(w))
                values.sum().backward()
            results.append((values.detach(), h.grad, w.grad, rows))
    return results


@pytest.mark.parametrize("share", [0, 1, 6])
@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_masked_tokens_are_not_multiplied_and_change_nothing(sequence_parallel, share):
    """share: of 7 tokens; they lie unevenly in the two slices of the sequence."""
    for results in run_ranks(masked_on_rank, 2, sequence_parallel, share):
        half = len(results) // 2
        for skipped, whole in zip(results[:half], results[half:], strict=True):
            for one, other in zip(skipped[:3], whole[:3], strict=True):
                assert_within(one, other, atol=1e-12)
            tokens = 12 * B
            assert whole[3] == tokens
            assert skipped[3] <= tokens * share / 7 + 2 * (1 + sequence_parallel)
