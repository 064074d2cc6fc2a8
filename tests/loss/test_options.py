"""Smoothing, z-loss, entropy bonus, softcap, temperature, accuracy: each against its definition."""

from itertools import product

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from close import assert_within
from oracle import dense_statistics, meant, uniform_cross_entropy
from ranks import run_ranks

from megatron_infoentropy import InfoEntropyConfig, infoentropy_loss, vocab_parallel_statistics

V, TRUE_SIZE = 512, 401


def random_case(n=23, v=V, scale=3.0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(5)
    logits = (torch.randn(n, v, generator=generator) * scale).to(dtype)
    return logits, torch.randint(0, TRUE_SIZE, (n,), generator=generator)


def loss_and_gradient(function, logits):
    leaf = logits.clone().requires_grad_()
    loss = function(leaf)
    loss.backward()
    return loss.detach(), leaf.grad


def test_smoothing_without_weights_is_pytorchs_own():
    logits, target = random_case()
    target[3] = -100
    config = InfoEntropyConfig(gamma=0.0, label_smoothing=0.1)
    ours = loss_and_gradient(lambda x: infoentropy_loss(x, target, config), logits)
    theirs = loss_and_gradient(
        lambda x: F.cross_entropy(x, target, label_smoothing=0.1, ignore_index=-100), logits
    )
    for mine, other in zip(ours, theirs, strict=True):
        assert_within(mine, other, atol=1e-13)


@pytest.mark.parametrize("detach", [True, False], ids=["detached", "attached"])
def test_z_loss_and_entropy_bonus_are_added_to_every_tokens_loss(detach):
    logits, target = random_case()
    config = InfoEntropyConfig(
        z_loss=1e-2, entropy_bonus=0.3, normalization="none", detach_weight=detach
    )

    def dense(leaf):
        ce, entropy, lse = dense_statistics(leaf, target)
        weight = 1 + (entropy.detach() if detach else entropy)
        return (weight * (ce + 1e-2 * lse**2 - 0.3 * entropy)).mean()

    ours = loss_and_gradient(lambda x: infoentropy_loss(x, target, config), logits)
    for mine, truth in zip(ours, loss_and_gradient(dense, logits), strict=True):
        assert_within(mine, truth, atol=1e-12)


@pytest.mark.parametrize("options", [{"softcap": 4.0}, {"temperature": 0.5}], ids=str)
def test_softcap_and_temperature_are_part_of_the_model(options):
    logits, target = random_case()
    config = InfoEntropyConfig(normalization="none", **options)

    def dense(leaf):
        ce, entropy, _ = dense_statistics(meant(leaf, **options), target)
        return ((1 + entropy).detach() * ce).mean()

    ours = loss_and_gradient(lambda x: infoentropy_loss(x, target, config), logits)
    for mine, truth in zip(ours, loss_and_gradient(dense, logits), strict=True):
        assert_within(mine, truth, atol=1e-13)


def test_accuracy_is_that_of_argmax_and_ties_count():
    logits, target = random_case(n=400, dtype=torch.float32)
    best = logits[:, :TRUE_SIZE].argmax(-1)
    target[::3] = best[::3]
    target[6] = -100
    is_top = vocab_parallel_statistics(logits, target, vocab_size=TRUE_SIZE).is_top
    assert is_top.dtype == torch.bool
    assert torch.equal(is_top, best == target)
    tied = torch.zeros(2, 9)
    assert vocab_parallel_statistics(tied, torch.tensor([4, -100])).is_top.tolist() == [True, False]


def test_the_weight_is_that_of_the_plain_statistics():
    """Smoothing and regularisers change what a weight multiplies, never the weight."""
    logits, target = random_case()
    plain = InfoEntropyConfig(objective="focal", gamma=2.0, normalization="none")
    smooth = InfoEntropyConfig(
        objective="focal", gamma=2.0, normalization="none", label_smoothing=0.2
    )
    ce, _, _ = dense_statistics(logits, target)
    weight = (1 - (-ce).exp()) ** 2
    difference = infoentropy_loss(logits, target, smooth) - infoentropy_loss(logits, target, plain)
    expected = (weight * 0.2 * (uniform_cross_entropy(logits) - ce)).mean()
    assert_within(difference, expected, atol=1e-13)


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
    logits, target = random_case(scale=6.0)
    logits[1] = 2.0  # the maximum is tied across all shards
    logits[2, int(target[2])] += 25  # p rounds to 1
    target[4] = -100
    generator = torch.Generator().manual_seed(8)
    return logits, target, torch.randn(5, len(target), generator=generator).double()


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("collective", ["gather", "all_reduce"])
@pytest.mark.parametrize(
    "options",
    [
        {"softcap": 7.0, "temperature": 0.6},
        {"temperature": torch.linspace(0.3, 2.3, 23)},  # one a token
    ],
    ids=lambda options: "-".join(options),
)
def test_every_statistic_of_shards_equals_dense_float64(options, collective, world):
    """Of 4 shards the last is mostly padding, which is left out; the fifth token takes no part."""
    logits, target, upstream = everything_case()
    leaf = logits.clone().requires_grad_()
    temperature = torch.as_tensor(options["temperature"], dtype=torch.float64).unsqueeze(-1)
    kept = meant(leaf[:, :TRUE_SIZE], options.get("softcap"), temperature)
    valid = target != -100
    truth = [*dense_statistics(kept, target), uniform_cross_entropy(kept) * valid]
    truth.append(kept.softmax(-1).square().sum(-1) * valid)
    torch.autograd.backward(truth, list(upstream))
    of_target = kept.gather(-1, target.clamp_min(0).unsqueeze(-1)).squeeze(-1)
    for rank, (parts, is_top, gradient) in enumerate(
        run_ranks(everything_on_rank, world, options, collective)
    ):
        for part, expected in zip(parts, truth, strict=True):
            assert_within(part, expected.detach(), atol=1e-11)
        assert torch.equal(is_top, (of_target == kept.amax(-1)) & valid)
        assert_within(gradient, leaf.grad.chunk(world, -1)[rank], atol=1e-11)


@pytest.mark.parametrize(
    ("temperature", "message"),
    [
        (torch.ones(3), r"one a token, in the target's shape \[23\], got \[3\]"),
        (torch.zeros(23), "temperatures must be positive, got 0.0"),
        (torch.full((23,), torch.nan), "temperatures must be positive, got nan"),
        (-torch.ones(23), "temperatures must be positive, got -1.0"),
    ],
    ids=["shape", "zero", "nan", "negative"],
)
def test_a_temperature_that_no_token_can_have_is_refused(temperature, message):
    logits, target = random_case()
    with pytest.raises(ValueError, match=message):
        vocab_parallel_statistics(logits, target, temperature=temperature)


def test_four_statistics_are_gathered_unless_more_are_asked_for():
    for sizes in run_ranks(gathered_bytes, 2):
        assert sizes == [8 * 16, 8 * 20, 8 * 20, 8 * 24]


def gathered_bytes():
    from unittest import mock

    sizes = []
    for objective, label_smoothing in product(("infoentropy", "deft"), (0.0, 0.1)):
        config = InfoEntropyConfig(objective=objective, label_smoothing=label_smoothing)
        wrapped = mock.Mock(wraps=dist.all_gather_into_tensor)
        with mock.patch.object(dist, "all_gather_into_tensor", wrapped):
            infoentropy_loss(torch.zeros(8, 32), torch.arange(8), config, group=dist.group.WORLD)
        (call,) = wrapped.call_args_list
        sizes.append(call.args[-1].numel() * call.args[-1].element_size())
    return sizes


@pytest.mark.parametrize("name", ["softcap", "temperature"])
@pytest.mark.parametrize("value", [0.0, -1.0, 1e-40, 1e39, torch.inf, torch.nan])
def test_arguments_that_mean_nothing_are_refused(name, value):
    with pytest.raises(ValueError, match=f"{name} must be positive and finite"):
        vocab_parallel_statistics(torch.zeros(1, 3), torch.tensor([0]), **{name: value})
