"""Weights of one's own, blends and schedules: what a token's loss is multiplied by."""

import dataclasses

import pytest
import torch
import torch.distributed as dist
from close import assert_within
from oracle import dense_statistics
from ranks import run_ranks

from megatron_infoentropy import InfoEntropyConfig, infoentropy_loss, linear_infoentropy_loss
from megatron_infoentropy.loss import TokenStatistics
from megatron_infoentropy.loss.token_batch import token_batch
from megatron_infoentropy.loss.weighting import check_weighting, token_weight

NO_FUNCTION = {}


def surprise(tokens, power=2):
    """A weight that depends on both, and on nothing that the package has."""
    return 0.5 + torch.tanh(tokens.cross_entropy - tokens.entropy) ** power


def of_two(cross_entropy, entropy, power=2):
    """The same as `surprise`, in the short form."""
    return 0.5 + torch.tanh(cross_entropy - entropy) ** power


def of_three(cross_entropy, entropy, logsumexp):
    return cross_entropy


def curriculum(tokens):
    """A weight of everything that a weighting is shown."""
    rare = (tokens.target % 7 == 0) & ~tokens.is_top
    weight = 1 + rare * tokens.token_input + tokens.samples * 1e-3
    above = tokens.entropy >= tokens.quantile(tokens.entropy, 0.5)
    surprise = torch.sigmoid(tokens.logsumexp - tokens.mean(tokens.cross_entropy))
    return weight * (above + surprise) * (1 + tokens.mask)


def scalar(tokens):
    return tokens.entropy.mean()


def inverse(tokens):
    return 1 / tokens.entropy


def singular_at_one(tokens):
    return 1 / (tokens.entropy - 1).abs()


def surprise_alone(tokens):
    return tokens.cross_entropy - tokens.entropy


def root(tokens):
    return tokens.entropy.sqrt()


def step(tokens):
    return (tokens.entropy > 1).float()


def above_median(tokens):
    """A weight that compares all tokens with each other."""
    median = tokens.entropy[tokens.mask != 0].median()
    return (tokens.entropy >= median).to(tokens.entropy.dtype)


def custom(name, **settings):
    """The configuration with a weighting of this module."""
    return InfoEntropyConfig(objective="custom", weighting=f"test_weighting:{name}", **settings)


def random_case():
    generator = torch.Generator().manual_seed(2)
    logits = (torch.randn(19, 61, generator=generator) * 2).double()
    return logits, torch.randint(0, 61, (19,), generator=generator)


def batch_case(data_rank):
    generator = torch.Generator().manual_seed(5 + data_rank)
    hidden = torch.randn(12, 3, 8, generator=generator).double()
    hidden *= torch.linspace(0.1, 3, 36).view(12, 3, 1)  # entropies differ along the tokens
    weight = torch.randn(60, 8, generator=torch.Generator().manual_seed(4)).double()
    return hidden, weight, torch.randint(0, 60, (12, 3), generator=generator)


def test_a_weighting_of_two_arguments_is_the_short_form():
    logits, target = random_case()
    losses = [infoentropy_loss(logits, target, custom(name)) for name in ("surprise", "of_two")]
    assert losses[0] == losses[1]


def test_a_negative_weight_is_refused():
    logits, target = random_case()
    with pytest.raises(ValueError, match=r"'test_weighting:surprise_alone' gave \d+ negative"):
        infoentropy_loss(logits, target, custom("surprise_alone"))


@pytest.mark.parametrize(
    ("weighting", "message"),
    [
        ("no_such_module:weight", "cannot be loaded .*No module named 'no_such_module'"),
        ("test_weighting:weigh", "cannot be loaded .*has no attribute 'weigh'"),
        ("test_weighting:NO_FUNCTION", "is a dict, not a function"),
        (
            "test_weighting:of_three",
            r"take one argument, a TokenBatch .* or two, .* got of_three\(cross_entropy,",
        ),
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
    with pytest.raises(ValueError, match=message):
        check_weighting(custom(function, detach_weight=detach))


@pytest.mark.parametrize("detach", [True, False], ids=["detached", "attached"])
def test_a_weighting_that_can_be_used_passes_the_trial(detach):
    check_weighting(InfoEntropyConfig(detach_weight=detach))
    for name in ("surprise", "root", "step")[: 3 if detach else 1]:
        check_weighting(custom(name, detach_weight=detach))


def tokens_of(entropy, mask=None, **fields):
    entropy = torch.as_tensor(entropy, dtype=torch.float64)
    statistics = TokenStatistics(entropy, entropy, entropy, entropy > 1, None)
    mask = None if mask is None else torch.tensor(mask)
    return token_batch(statistics, mask, **fields)


@pytest.mark.parametrize(
    ("share", "expected"), [(0.0, 1.0), (0.1, 1.0), (0.2, 2.0), (0.5, 3.0), (0.99, 5.0)]
)
def test_a_quantile_is_of_the_tokens_that_take_part(share, expected):
    tokens = tokens_of([[5.0, 1.0, 4.0, 7.0], [3.0, 2.0, 0.0, 9.0]], [[1, 1, 1, 0], [1, 1, 0, 0]])
    assert tokens.quantile(tokens.entropy, share) == expected
    nobody = tokens_of([1.0, 2.0], [0, 0])
    assert nobody.quantile(nobody.entropy, share).isnan()


def curriculum_on_rank():
    rank, world = dist.get_rank(), dist.group.WORLD
    hidden, weight, target = batch_case(rank)
    mask = (torch.rand(12, 3, generator=torch.Generator().manual_seed(rank)) * 4).clamp_max(1)
    mask[:2] = 0
    extra = torch.rand(12, 3, generator=torch.Generator().manual_seed(7 + rank))
    config = custom("curriculum", chunk_tokens=5)
    more = {"data_parallel_group": world, "samples": 640, "token_input": extra}
    losses = [
        infoentropy_loss(hidden @ weight.T, target, config, loss_mask=mask, **more),
        linear_infoentropy_loss(hidden, weight, target, config, loss_mask=mask, **more),
    ]
    return losses, (hidden @ weight.T, target, mask, extra)


def test_a_weighting_sees_the_batch_and_sums_over_data_parallel_ranks():
    """Masks of fractions, samples, an input of one's own and the other rank, in float64."""
    results = run_ranks(curriculum_on_rank, 2)
    cases = [case for _, case in results]
    valid = [mask != 0 for _, _, mask, _ in cases]
    parts = [dense_statistics(logits, target) for logits, target, _, _ in cases]
    mean = torch.cat([ce[v] for (ce, _, _), v in zip(parts, valid, strict=True)]).mean()
    total, tokens, inverse_means = 0.0, 0.0, []
    for (logits, target, mask, extra), (ce, entropy, lse), v in zip(
        cases, parts, valid, strict=True
    ):
        is_top = logits.argmax(-1) == target
        ordered = entropy[v].sort().values
        above = entropy >= ordered[round(len(ordered) / 2)]
        weight = 1 + ((target % 7 == 0) & ~is_top) * extra + 0.64
        weight = weight * (above + torch.sigmoid(lse - mean)) * (1 + mask) * mask
        total += (weight * ce).sum()
        tokens += mask.sum()
        inverse_means.append(mask.sum() / weight.sum())
    expected = total / tokens * sum(inverse_means) / 2
    for losses, _ in results:
        for loss in losses:
            assert_within(loss, expected, rtol=1e-7)


def test_tokens_of_low_entropy_are_dropped_with_probability_gamma():
    entropy = torch.rand(100, 200, generator=torch.Generator().manual_seed(1)).double()
    target = torch.randint(0, 50_000, entropy.shape, generator=torch.Generator().manual_seed(2))
    config = InfoEntropyConfig(objective="entrodrop", quantile=0.4, gamma=0.25)
    first, again, later = (
        token_weight(tokens_of(entropy, target=target, samples=samples), config)
        for samples in (512, 512, 513)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, later)
    low = entropy < entropy.flatten().sort().values[8000]
    assert (first[~low] == 1).all()
    for weight in (first, later):
        dropped = (weight[low] == 0).double()
        assert abs(dropped.mean() - 0.25) < 4 * (0.25 * 0.75 / 8000) ** 0.5
        rows = dropped[:8000].view(80, 100)  # nor do neighbours fall together
        assert abs((rows[:, 1:] * rows[:, :-1]).mean() - 0.0625) < 0.012
    everything = dataclasses.replace(config, gamma=1.0)
    selected = dataclasses.replace(config, objective="eslm")
    batch = tokens_of(entropy, target=target)
    assert torch.equal(token_weight(batch, everything), token_weight(batch, selected))


@pytest.mark.parametrize("objective", ["eslm", "entrodrop"])
def test_a_selection_leaves_nan_where_it_is(objective):
    batch = tokens_of([1.0, float("nan"), 3.0, 4.0], [1, 1, 1, 0], target=torch.zeros(4).long())
    weight = token_weight(batch, InfoEntropyConfig(objective=objective, quantile=0.5))
    assert weight.isnan().tolist() == [False, True, False, False]
