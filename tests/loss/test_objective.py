"""The scalar objective against float64: every setting, masks, data-parallel ranks, odd weights."""

from itertools import product

import pytest
import torch
import torch.distributed as dist
from close import assert_within
from dense import dense_loss
from oracle import published_code
from ranks import run_ranks

from megatron_infoentropy import InfoEntropyConfig, infoentropy_loss, linear_infoentropy_loss
from megatron_infoentropy.loss.objective import TokenSums, alpha, reduce_sums

V = 64
NORMALIZATIONS = ["paper", "global", "none"]
WEIGHTS = [
    *({"objective": name} for name in ("cross_entropy", "deft")),
    *({"objective": name, "gamma": gamma} for name, gamma in product(
        ("infoentropy", "focal", "lin_focal", "eaft", "dft"), (0.0, 0.5, 1.0, 2.0)
    )),
    {"gamma": -1.0},
    {"gamma": 2.0, "blend": 0.3},
    {"gamma": 2.0, "blend": 1.0},
    {"objective": "eslm", "quantile": 0.3},
    # The latter two are singular where tokens that are left out have their statistics.
    *({"objective": "custom", "weighting": f"test_weighting:{name}"}
      for name in ("surprise", "inverse", "singular_at_one")),
]  # fmt: skip
OPTIONS = [
    {"z_loss": 1e-2, "entropy_bonus": 0.3},
    {"label_smoothing": 0.1, "objective": "focal", "gamma": 2.0},
    {"label_smoothing": 0.1, "gamma": 0.0},
    {"softcap": 4.0},
    {"temperature": 0.5},
    {"label_smoothing": 0.1, "z_loss": 0.01, "entropy_bonus": 0.2, "softcap": 4.0},
]


SETTINGS = [
    weights | {"normalization": normalization, "detach_weight": detach}
    for weights, normalization, detach in product(WEIGHTS + OPTIONS, NORMALIZATIONS, (True, False))
    if detach or weights.get("objective") not in ("eslm", "deft")  # which have no gradient
]


def make_batches(ranks, dtype=torch.float64):
    """Unequal masks: rank 0 keeps most tokens, later ranks fewer."""
    generator = torch.Generator().manual_seed(3)
    batches = []
    for rank in range(ranks):
        logits = (torch.randn(2, 9, V, generator=generator) * 3).to(dtype)
        target = torch.randint(0, V, (2, 9), generator=generator)
        target[0, rank] = -100
        mask = (torch.rand(2, 9, generator=generator) > 0.2 + 0.2 * rank).to(dtype)
        batches.append((logits, target, mask))
    return batches


def our_loss(logits, target, config, *, fused, **options):
    """The loss of logits, or the fused one whose output layer changes nothing."""
    if fused:
        identity = torch.eye(logits.shape[-1], dtype=logits.dtype)
        return linear_infoentropy_loss(logits, identity, target, config, **options)
    return infoentropy_loss(logits, target, config, **options)


@pytest.mark.parametrize("fused", [False, True], ids=["logits", "fused"])
@pytest.mark.parametrize(
    "settings", SETTINGS, ids=lambda settings: "-".join(map(str, settings.values()))
)
def test_value_and_gradient_equal_float64(settings, fused):
    config = InfoEntropyConfig(**settings, chunk_tokens=7)
    ((logits, target, mask),) = make_batches(1)
    ours, truth = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    loss = our_loss(ours, target, config, fused=fused, loss_mask=mask)
    (loss * -0.3).backward()  # what a caller does to it: gradient scaling, accumulation
    expected = dense_loss([(truth, target, mask)], config)
    (expected * -0.3).backward()
    assert_within(loss, expected, rtol=1e-12)
    assert_within(ours.grad, truth.grad, atol=1e-12)


def test_deft_has_the_gradient_of_its_papers_loss():
    """(1 - p^S) / S with a constant S = sum p^2."""
    ((logits, target, mask),) = make_batches(1)
    ours, truth = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    infoentropy_loss(ours, target, InfoEntropyConfig(objective="deft"), loss_mask=mask).backward()
    kept = (mask != 0) & (target != -100)
    squares = truth[kept].softmax(-1).square().sum(-1).detach()
    p = truth[kept].softmax(-1).gather(-1, target[kept].unsqueeze(-1)).squeeze(-1)
    ((1 - p**squares) / squares).mean().backward()
    assert_within(ours.grad, truth.grad, atol=1e-12)


def data_parallel_case(odd_rank):
    """The ranks' batches; all tokens of rank 1 masked, or certain and right: focal weight 0."""
    batches = make_batches(2)
    logits, target, mask = batches[1]
    if odd_rank == "empty":
        batches[1] = (logits, target, torch.zeros_like(mask))
    if odd_rank == "certain":
        right = torch.nn.functional.one_hot(target.clamp_min(0), V).double()
        batches[1] = (right * 1e4, target, mask)
    return batches


def data_parallel_rank(settings, odd_rank, fused):
    """This rank's loss, and the average over ranks of the gradient of a shared parameter."""
    rank, world = dist.get_rank(), dist.get_world_size()
    logits, target, mask = data_parallel_case(odd_rank)[rank]
    scale = torch.tensor([1.0, 0.5], dtype=torch.float64, requires_grad=True)
    loss = our_loss(
        logits * scale[0] + logits.sin() * scale[1],
        target,
        InfoEntropyConfig(**settings),
        fused=fused,
        loss_mask=mask,
        data_parallel_group=dist.group.WORLD,
    )
    loss.backward()
    dist.all_reduce(scale.grad)
    return loss.detach(), scale.grad / world


@pytest.mark.parametrize("fused", [False, True], ids=["logits", "fused"])
@pytest.mark.parametrize("odd_rank", [None, "empty", "certain"])
@pytest.mark.parametrize("detach", [True, False], ids=["detached", "attached"])
@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_averaging_gradients_over_data_ranks_gives_the_gradient_of_the_value(
    normalization, detach, odd_rank, fused
):
    """A rank whose tokens all weigh nothing is left out of the mean of 1 / mean(w)."""
    settings = {"gamma": 2.0, "normalization": normalization, "detach_weight": detach}
    if odd_rank == "certain":
        settings["objective"] = "focal"
    results = run_ranks(data_parallel_rank, 2, settings, odd_rank, fused)
    scale = torch.tensor([1.0, 0.5], dtype=torch.float64, requires_grad=True)
    batches = [
        (x * scale[0] + x.sin() * scale[1], y, mask) for x, y, mask in data_parallel_case(odd_rank)
    ]
    expected = dense_loss(batches, InfoEntropyConfig(**settings))
    expected.backward()
    for loss, grad in results:
        assert torch.equal(loss, results[0][0])
        assert_within(loss, expected, rtol=1e-12)
        assert_within(grad, scale.grad, rtol=1e-10)


@pytest.mark.parametrize("normalization", ["paper", "global"])
def test_a_weight_that_is_not_a_number_is_never_taken_for_no_weight(normalization):
    sums = TokenSums(torch.tensor(1.0), torch.tensor(torch.nan), torch.tensor(3.0))
    assert alpha(reduce_sums(sums, None), normalization).isnan()


@pytest.mark.parametrize("detach", [True, False], ids=["detached", "attached"])
@pytest.mark.parametrize("normalization", ["paper", "global"])
@pytest.mark.parametrize("gap", [20.0, 30.0, 40.0, 60.0, 85.0, 200.0])
def test_weights_next_to_nothing_overflow_neither_value_nor_gradient(gap, normalization, detach):
    """Both tokens are certain, one is wrong; from gap 35 on their weights sum to under 2^-100."""
    settings = {"gamma": 2.5, "sigma": 0.0, "normalization": normalization}
    config = InfoEntropyConfig(**settings, detach_weight=detach, backend="reference")
    logits = torch.zeros(2, 2)
    logits[:, 0] = gap
    target = torch.tensor([0, 1])
    truth, ours = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    expected = dense_loss([(truth, target, torch.ones(2))], config)
    loss = infoentropy_loss(ours, target, config)
    loss.backward()
    expected.backward()
    assert loss.isfinite()
    assert ours.grad.isfinite().all()
    if gap < 35:
        assert_within(loss, expected, rtol=1e-5)
        assert_within(ours.grad, truth.grad, rtol=1e-3, atol=1e-5)
    assert 0 <= loss <= expected * (1 + 1e-5)


def test_without_a_valid_token_the_loss_and_its_gradient_are_zero():
    for normalization in NORMALIZATIONS:
        logits = torch.full((3, V), torch.nan, requires_grad=True)
        config = InfoEntropyConfig(normalization=normalization)
        loss = infoentropy_loss(logits, torch.zeros(3).long(), config, loss_mask=torch.zeros(3))
        loss.backward()
        assert loss == 0
        assert torch.equal(logits.grad, torch.zeros(3, V))


def test_the_published_code_differs_by_its_clamp_and_by_nothing_else():
    """The clamp at 1e-8 adds up to V 1e-8 ln 1e8 nats to an entropy: bounded here, not copied."""
    v = 4096
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(50, v, generator=generator, dtype=torch.float64) * 6
    target = torch.randint(0, v, (50,), generator=generator)
    ours = infoentropy_loss(logits, target)
    published = published_code(logits, target, gamma=1.0)
    clamp = v * 1e-8 * 18.43  # most that the clamp can add to a weight, all of which are >= 1
    assert 0 < abs(ours - published) <= 2 * clamp * published
    mild = logits / 6 * 1.5  # no probability below the clamp: the same number
    assert mild.softmax(-1).min() > 1e-8
    assert_within(infoentropy_loss(mild, target), published_code(mild, target, 1.0), rtol=1e-12)


def test_the_published_code_counts_ignored_tokens_and_ours_does_not():
    logits, target = make_batches(1)[0][:2]
    logits, target = logits.flatten(0, 1), target.flatten().clone()
    target[::3] = -100
    with_gamma_zero = infoentropy_loss(logits, target, InfoEntropyConfig(gamma=0))
    valid = (target != -100).double().mean()
    assert_within(published_code(logits, target, gamma=0.0), with_gamma_zero * valid, rtol=1e-12)


def test_focal_weights_of_certain_tokens_have_finite_gradients_when_attached():
    logits = torch.full((2, V), -200.0)
    logits[:, 3] = 200.0
    logits.requires_grad_()
    config = InfoEntropyConfig(objective="focal", gamma=0.5, detach_weight=False)
    infoentropy_loss(logits, torch.tensor([3, 4]), config).backward()
    assert logits.grad.isfinite().all()


def test_a_schedule_is_refused_where_no_samples_go_by():
    config = InfoEntropyConfig(gamma=0.0, gamma_schedule="linear", gamma_end=2.0, gamma_samples=10)
    logits, target = torch.zeros(2, 3), torch.zeros(2, dtype=torch.long)
    with pytest.raises(ValueError, match=r"only the trainer does: pass config.at\(samples\)"):
        infoentropy_loss(logits, target, config)
    with pytest.raises(ValueError, match=r"pass config.at\(samples\)"):
        linear_infoentropy_loss(logits, torch.zeros(5, 3), target, config)
    assert infoentropy_loss(logits, target, config.at(5)) > 0
