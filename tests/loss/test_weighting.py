"""Weights of one's own, blends and schedules: what a token's loss is multiplied by."""

import pytest
import torch
from close import assert_within
from oracle import dense_statistics

from megatron_infoentropy import InfoEntropyConfig, infoentropy_loss

CUSTOM = {"objective": "custom", "weighting": "test_weighting:surprise"}


def surprise(cross_entropy, entropy):
    """A weight that depends on both, and on nothing that the package has."""
    return 0.5 + torch.tanh(cross_entropy - entropy) ** 2


def scalar(cross_entropy, entropy):
    return entropy.mean()


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
