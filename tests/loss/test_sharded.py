"""A sharded vocabulary gives what the whole one gives; all ranks agree to the bit."""

import pytest
import torch
import torch.distributed as dist
from close import assert_within
from dense import dense_results
from linear_cases import recorded
from ranks import run_ranks

from megatron_infoentropy import InfoEntropyConfig, infoentropy_loss, vocab_parallel_statistics

N, V = 29, 1016  # divides by 1, 2, 4 ranks; no shard is a multiple of a register times a chunk
TRUE_SIZE = 700  # with 4 ranks the last shard is all padding, with 2 the last is part padding


def make_case(dtype):
    generator = torch.Generator().manual_seed(7)
    logits = (torch.randn(N, V, generator=generator) * 4).to(dtype)
    target = torch.randint(0, TRUE_SIZE, (N,), generator=generator)
    logits[0, : V // 2] = -torch.inf  # whole shards without mass
    target[0] = V // 2 + 3
    logits[1] = 2.0  # the maximum is tied across all shards
    logits[2, : V - V // 4] = -torch.inf  # all but the last of four shards
    target[2] = 3  # ... where its cross entropy is infinite
    target[[5, 6]] = -100
    logits[5] = torch.nan
    upstream = torch.randn(3, N, generator=generator)
    upstream[0, 2] = 0
    return logits, target, upstream


def one_rank(dtype, vocab_size, backend, collective, rank=0, world=1, group=None):
    logits, target, upstream = make_case(dtype)
    if vocab_size is not None:
        target[2] = 3
        logits[2] = logits[3]
    shard = logits.chunk(world, -1)[rank].clone().requires_grad_()
    got = vocab_parallel_statistics(
        shard,
        target,
        group=group,
        vocab_size=vocab_size,
        backend=backend,
        collective=collective,
    )
    usable = torch.stack(got[:3]).masked_fill(torch.stack(got[:3]) == torch.inf, 0)
    (usable * upstream).sum().backward()
    return [part.detach() for part in got[:4]], shard.grad


def on_rank(*arguments):
    rank, world = dist.get_rank(), dist.get_world_size()
    return one_rank(*arguments, rank, world, dist.group.WORLD)


@pytest.mark.parametrize("vocab_size", [None, TRUE_SIZE])
@pytest.mark.parametrize("collective", ["gather", "all_reduce"])
@pytest.mark.parametrize("backend", ["reference", "native"])
@pytest.mark.parametrize("world", [2, 4])
def test_shards_equal_the_whole(world, backend, collective, vocab_size):
    results = run_ranks(on_rank, world, torch.float32, vocab_size, backend, collective)
    whole, whole_grad = one_rank(torch.float32, vocab_size, backend, collective)
    for statistics, _ in results:
        for part, expected in zip(statistics, whole, strict=True):
            assert_within(part, expected, rtol=2.4e-7, atol=2e-6)
    joined = torch.cat([grad for _, grad in results], -1)
    assert_within(joined, whole_grad, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("backend", ["reference", "native"])
def test_gathered_results_are_bitwise_equal_on_all_ranks_and_runs(world, backend):
    arguments = (torch.bfloat16, None, backend, "gather")
    first = run_ranks(on_rank, world, *arguments)
    again = run_ranks(on_rank, world, *arguments)
    for statistics, _ in [*first, *again]:
        for part, expected in zip(statistics, first[0][0], strict=True):
            assert torch.equal(part, expected)
    for (_, a), (_, b) in zip(first, again, strict=True):
        assert torch.equal(a, b)


def sent_on_rank(settings):
    """The collectives of the loss, forward and backward: (name, bytes a token) of each."""
    logits, config = torch.randn(8, 32, requires_grad=True), InfoEntropyConfig(**settings)
    with recorded() as forward:
        loss = infoentropy_loss(logits, torch.arange(8), config, group=dist.group.WORLD)
    with recorded() as backward:
        loss.backward()
    return [(name, size // 8) for name, size in forward], backward


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, [("all_gather_into_tensor", 16)]),
        ({"label_smoothing": 0.1}, [("all_gather_into_tensor", 20)]),
        ({"objective": "deft"}, [("all_gather_into_tensor", 20)]),
        ({"objective": "deft", "label_smoothing": 0.1}, [("all_gather_into_tensor", 24)]),
        ({"collective": "all_reduce"}, [("all_reduce", 4), ("all_reduce", 16)]),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_forward_sends_what_is_promised_and_backward_nothing(settings, expected):
    for sent in run_ranks(sent_on_rank, 2, settings):
        assert sent == (expected, [])


def everything_on_rank(options, collective):
    """All statistics, whether the target is the top, and the gradient of the former."""
    rank, world = dist.get_rank(), dist.get_world_size()
    logits, target, upstream = everything_case()
    shard = logits.chunk(world, -1)[rank].clone().requires_grad_()
    got = vocab_parallel_statistics(
        shard,
        target,
        group=dist.group.WORLD,
        vocab_size=TRUE_SIZE,
        sum_p_squared=True,
        uniform_cross_entropy=True,
        collective=collective,
        backend="reference",
        **options,
    )
    parts = [part for name, part in got._asdict().items() if name != "is_top"]
    torch.autograd.backward(parts, list(upstream))
    return [part.detach() for part in parts], got.is_top, shard.grad


def everything_case():
    generator = torch.Generator().manual_seed(5)
    logits = torch.randn(N, V, generator=generator).double() * 6
    target = torch.randint(0, TRUE_SIZE, (N,), generator=generator)
    logits[1] = 2.0  # the maximum is tied across all shards
    logits[2, int(target[2])] += 25  # p rounds to 1
    target[::3] = logits[:, :TRUE_SIZE].argmax(-1)[::3]
    target[4] = -100
    return logits, target, torch.randn(5, N, generator=generator).double()


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("collective", ["gather", "all_reduce"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"softcap": 7.0, "temperature": 0.6},
        {"temperature": torch.linspace(0.3, 2.3, N)},  # one a token
    ],
    ids=lambda options: "-".join(options) or "plain",
)
def test_every_statistic_of_shards_equals_dense_float64(options, collective, world):
    """The last of 4 shards is all padding, which is left out; the fifth token takes no part."""
    logits, target, upstream = everything_case()
    leaf = logits.clone().requires_grad_()
    truth = dense_results(leaf[:, :TRUE_SIZE], target, **options)
    torch.autograd.backward(truth, list(upstream))
    is_best = (
        logits[:, :TRUE_SIZE].amax(-1) == logits.gather(-1, target.clamp_min(0)[:, None])[:, 0]
    )
    for rank, (parts, is_top, gradient) in enumerate(
        run_ranks(everything_on_rank, world, options, collective)
    ):
        for part, expected in zip(parts, truth, strict=True):
            assert_within(part, expected.detach(), atol=1e-11)
        assert torch.equal(is_top, is_best & (target != -100))
        assert_within(gradient, leaf.grad.chunk(world, -1)[rank], atol=1e-11)


def megatron_cross_entropy(dtype):
    """Megatron's own loss and ours on this rank's shard: values and gradients."""
    from megatron.core.tensor_parallel.cross_entropy import vocab_parallel_cross_entropy

    generator = torch.Generator().manual_seed(11)
    full = (torch.randn(6, 5, 512, generator=generator) * 3).to(dtype)
    target = torch.randint(0, 512, (6, 5), generator=generator)
    upstream = torch.rand(6, 5, generator=generator)
    rank, world = dist.get_rank(), dist.get_world_size()
    shard = full.chunk(world, -1)[rank]
    ours, theirs = (shard.clone().requires_grad_() for _ in range(2))
    mine = vocab_parallel_statistics(ours, target, group=dist.group.WORLD).cross_entropy
    (mine * upstream).sum().backward()
    # Megatron works in place on fp32 logits: give it a tensor of its own.
    other = vocab_parallel_cross_entropy(theirs * 1, target, tp_group=dist.group.WORLD)
    (other * upstream).sum().backward()
    return mine.detach(), other.detach(), ours.grad, theirs.grad


def test_cross_entropy_equals_megatrons_own_in_value_and_gradient():
    for mine, other, my_grad, other_grad in run_ranks(megatron_cross_entropy, 2, torch.float32):
        assert_within(mine, other, atol=3e-6, rtol=5e-7)
        assert_within(my_grad, other_grad, atol=5e-7, rtol=1e-6)
