"""Weights of one's own, blends and schedules: what a token's loss is multiplied by."""

import pytest
import torch
import torch.distributed as dist
from close import assert_within
from oracle import dense_statistics
from ranks import run_ranks

from megatron_infoentropy import InfoEntropyConfig, infoentropy_loss, linear_infoentropy_loss
from megatron_infoentropy.loss.weighting import check_weighting

CUSTOM = {"objective": "custom", "weighting": "test_weighting:surprise"}


def surprise(cross_entropy, entropy):
    """A weight that depends on both, and on nothing that the package has."""
    return 0.5 + torch.tanh(cross_entropy - entropy) ** 2


def scalar(cross_entropy, entropy):
    return entropy.mean()


def inverse(cross_entropy, entropy):
    return 1 / entropy


def singular_at_one(cross_entropy, entropy):
    return 1 / (entropy - 1).abs()


def surprise_alone(cross_entropy, entropy):
    return cross_entropy - entropy


def root(cross_entropy, entropy):
    return entropy.sqrt()


def step(cross_entropy, entropy):
    return (entropy > 1).float()


def above_median(cross_entropy, entropy):
    """A weight that compares all tokens with each other."""
    return (entropy >= entropy.flatten().median()).to(entropy.dtype)


def share_of_sequence(cross_entropy, entropy):
    """A weight that compares the tokens of one row with each other."""
    return entropy / entropy.mean(-1, keepdim=True)


def random_case():
    generator = torch.Generator().manual_seed(2)
    logits = (torch.randn(19, 61, generator=generator) * 2).double()
    return logits, torch.randint(0, 61, (19,), generator=generator)


def loss_and_gradient(function):
    logits, target = random_case()
    leaf = logits.requires_grad_()
    loss = function(leaf, target)
    loss.backward()
    return loss.detach(), leaf.grad


@pytest.mark.parametrize("detach", [True, False], ids=["detached", "attached"])
@pytest.mark.parametrize("normalization", ["paper", "global", "none"])
def test_a_weighting_of_ones_own_gets_gradients_or_not(normalization, detach):
    config = InfoEntropyConfig(**CUSTOM, normalization=normalization, detach_weight=detach)

    def dense(leaf, target):
        ce, entropy, _ = dense_statistics(leaf, target)
        weight = surprise(ce, entropy)
        weight = weight.detach() if detach else weight
        return (weight * ce).mean() / (1 if normalization == "none" else weight.mean())

    ours = loss_and_gradient(lambda x, y: infoentropy_loss(x, y, config))
    for mine, truth in zip(ours, loss_and_gradient(dense), strict=True):
        assert_within(mine, truth, atol=1e-13)


@pytest.mark.parametrize("detach", [True, False], ids=["detached", "attached"])
@pytest.mark.parametrize("fused", [False, True], ids=["logits", "fused"])
@pytest.mark.parametrize("function", ["inverse", "singular_at_one"])
def test_a_weight_is_not_formed_of_tokens_that_are_left_out(function, fused, detach):
    config = InfoEntropyConfig(
        objective="custom", weighting=f"test_weighting:{function}", detach_weight=detach
    )
    _, target = random_case()
    output, kept = torch.eye(61).double(), slice(2, 17)
    with_ignored, mask = target.clone(), torch.ones(19)
    with_ignored[:2], mask[17:] = -100, 0

    def ours(leaf, _):
        if fused:
            return linear_infoentropy_loss(leaf, output, with_ignored, mask, config)
        return infoentropy_loss(leaf, with_ignored, config, loss_mask=mask)

    def dense(leaf, _):
        ce, entropy, _ = dense_statistics(leaf[kept], target[kept])
        weight = globals()[function](ce, entropy)
        weight = weight.detach() if detach else weight
        return (weight * ce).mean() / weight.mean()

    for mine, truth in zip(loss_and_gradient(ours), loss_and_gradient(dense), strict=True):
        assert_within(mine, truth, atol=1e-12)


def compared_case(data_rank=0):
    generator = torch.Generator().manual_seed(5 + data_rank)
    hidden = torch.randn(12, 3, 8, generator=generator).double()
    hidden *= torch.linspace(0.1, 3, 36).view(12, 3, 1)  # entropies differ along the tokens
    weight = torch.randn(60, 8, generator=torch.Generator().manual_seed(4)).double()
    return hidden, weight, torch.randint(0, 60, (12, 3), generator=generator)


def compared_on_rank(function, detach, chunk, sequence_parallel, data_parallel):
    """[(loss, gradients)] of the fused loss and of that of logits, on two ranks."""
    rank, world = dist.get_rank(), dist.group.WORLD
    hidden, weight, target = compared_case(rank if data_parallel else 0)
    if not data_parallel:
        weight = weight.chunk(2)[rank]
    options = {"data_parallel_group": world} if data_parallel else {"group": world}
    config = InfoEntropyConfig(
        objective="custom",
        weighting=f"test_weighting:{function}",
        detach_weight=detach,
        chunk_tokens=chunk,
    )
    results = []
    for fused in (True, False):
        part = hidden.chunk(2)[rank] if fused and sequence_parallel else hidden
        h, w = (x.clone().requires_grad_() for x in (part, weight))
        if fused:
            options["sequence_parallel"] = sequence_parallel
            loss = linear_infoentropy_loss(h, w, target, None, config, **options)
        else:
            options.pop("sequence_parallel")
            loss = infoentropy_loss(h @ w.T, target, config, **options)
        loss.backward()
        if not fused and not data_parallel:  # as an output layer does
            dist.all_reduce(h.grad)
        by_hidden = h.grad
        if not fused and sequence_parallel:
            by_hidden = by_hidden.chunk(2)[rank]
        results.append((loss.detach(), by_hidden, w.grad))
    return results


@pytest.mark.parametrize("detach", [True, False], ids=["detached", "attached"])
@pytest.mark.parametrize("layout", ["tensor", "sequence", "data"])
@pytest.mark.parametrize("function", ["above_median", "share_of_sequence"])
def test_a_weighting_that_compares_tokens_sees_all_of_them_whatever_the_chunks(
    function, layout, detach
):
    for chunk in (5, 1000):
        arguments = (function, detach, chunk, layout == "sequence", layout == "data")
        for fused, unfused in run_ranks(compared_on_rank, 2, *arguments):
            for one, other in zip(fused, unfused, strict=True):
                assert_within(one, other, atol=1e-12)


def test_a_negative_weight_is_refused():
    logits, target = random_case()
    config = InfoEntropyConfig(objective="custom", weighting="test_weighting:surprise_alone")
    with pytest.raises(ValueError, match=r"'test_weighting:surprise_alone' gave \d+ negative"):
        infoentropy_loss(logits, target, config)


@pytest.mark.parametrize("blend", [0.0, 0.3, 1.0])
def test_a_blend_mixes_the_weight_with_one(blend):
    config = InfoEntropyConfig(gamma=2.0, blend=blend, normalization="global")

    def dense(leaf, target):
        ce, entropy, _ = dense_statistics(leaf, target)
        weight = (1 - blend) * (1 + entropy.detach()) ** 2 + blend
        return (weight * ce).sum() / weight.sum()

    ours = loss_and_gradient(lambda x, y: infoentropy_loss(x, y, config))
    for mine, truth in zip(ours, loss_and_gradient(dense), strict=True):
        assert_within(mine, truth, atol=1e-13)


@pytest.mark.parametrize(
    ("weighting", "message"),
    [
        ("no_such_module:weight", "cannot be loaded .*No module named 'no_such_module'"),
        ("test_weighting:weigh", "cannot be loaded .*has no attribute 'weigh'"),
        ("test_weighting:CUSTOM", "is a dict, not a function"),
        ("test_weighting:scalar", r"must return a tensor of shape \[19\], one weight a token"),
    ],
)
def test_a_weighting_that_cannot_be_used_is_refused_by_name(weighting, message):
    logits, target = random_case()
    config = InfoEntropyConfig(objective="custom", weighting=weighting)
    with pytest.raises(ValueError, match=message):
        infoentropy_loss(logits, target, config)


@pytest.mark.parametrize(
    ("function", "detach", "message"),
    [
        ("weigh", True, "cannot be loaded"),
        ("scalar", True, r"must return a tensor of shape \[2, 2\]"),
        ("inverse", True, r"must return finite weights >= 0, got \[\[inf, 0.5\]"),
        ("surprise_alone", True, r"must return finite weights >= 0, got \[\[0.0, -1.0\]"),
        ("root", False, r"must have finite gradients, got \[\[inf, .*use detach_weight=True"),
        ("step", False, "do not depend on its arguments by torch operations"),
    ],
)
def test_a_weighting_is_tried_before_training(function, detach, message):
    config = InfoEntropyConfig(
        objective="custom", weighting=f"test_weighting:{function}", detach_weight=detach
    )
    with pytest.raises(ValueError, match=message):
        check_weighting(config)


@pytest.mark.parametrize("detach", [True, False], ids=["detached", "attached"])
def test_a_weighting_that_can_be_used_passes_the_trial(detach):
    check_weighting(InfoEntropyConfig(**CUSTOM, detach_weight=detach))
    check_weighting(InfoEntropyConfig(detach_weight=detach))
    for function in ("root", "step")[: 2 * detach]:
        check_weighting(
            InfoEntropyConfig(objective="custom", weighting=f"test_weighting:{function}")
        )
