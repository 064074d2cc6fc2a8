"""The trainer's loss function alone, over gloo ranks: alpha by data and context parallel groups."""

import functools
from itertools import product

import pytest
import torch
import torch.distributed as dist
from close import assert_within
from launch import run_forked
from oracle import dense_statistics, dense_weight

from megatron_infoentropy import InfoEntropyConfig

B, S, V = 2, 6, 30


def make_output(rank, certain=None):
    """([4, b, s] as the output processor gives, mask) of one rank; masks are far from equal.

    certain: a rank all of whose targets have probability 1.
    """
    generator = torch.Generator().manual_seed(rank)
    logits = torch.randn(B, S, V, generator=generator, dtype=torch.float64) * 3
    labels = torch.randint(0, V, (B, S), generator=generator)
    mask = (torch.rand(B, S, generator=generator) > 0.2 * rank).float()
    statistics = dense_statistics(logits, labels)
    is_top = logits.argmax(-1) == labels
    output = torch.stack([*statistics, is_top]).float()
    output[:2] *= rank != certain
    return output, mask


@functools.cache
def groups_of(layout):
    """Data and context groups of four ranks, context ranks next to one another; made once."""
    from megatron_infoentropy.integration.step import Groups

    if layout == "data 4":
        return Groups(None, dist.group.WORLD)
    context = [dist.new_group([i, i + 1]) for i in (0, 2)]
    data = [dist.new_group([i, i + 2]) for i in (0, 1)]
    return Groups(context[dist.get_rank() // 2], data[dist.get_rank() % 2])


def loss_on_rank(layout, settings, certain=None):
    from megatron_infoentropy.integration.step import training_loss

    output, mask = make_output(dist.get_rank(), certain)
    output.requires_grad_()
    config = InfoEntropyConfig(**settings)
    loss, count, report, _ = training_loss(mask, output, config, groups_of(layout))
    loss.backward()
    return loss.detach(), int(count), report, output.grad


NORMALIZATIONS, OBJECTIVES = ("paper", "global", "none"), ("infoentropy", "focal")
LAYOUTS = ("data 4", "context 2, data 2")
CASES = [
    *product(NORMALIZATIONS, OBJECTIVES, LAYOUTS, (True, False), (None,)),
    *product(("paper", "global"), ("focal",), ("data 4",), (True,), (3,)),
]


def losses_on_rank():
    """{case: what loss_on_rank gives}: one start of the ranks serves all."""
    names = ("normalization", "objective", "detach_weight")
    return {
        (normalization, objective, layout, detach, certain): loss_on_rank(
            layout,
            dict(zip(names, (normalization, objective, detach), strict=True), gamma=2.0),
            certain,
        )
        for normalization, objective, layout, detach, certain in CASES
    }


@pytest.fixture(scope="module")
def results_by_rank():
    return run_forked(losses_on_rank, 4)


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_sum_gradient_and_report_equal_the_formulas(case, results_by_rank):
    normalization, objective, layout, detach, certain = case
    results = [results[case] for results in results_by_rank]
    parts = []
    for rank in range(4):
        output, mask = make_output(rank, certain)
        ce, entropy, _, is_top = output.double().unbind(0)
        ce, entropy = ce.requires_grad_(), entropy.requires_grad_()
        weight = dense_weight(ce, entropy, objective, 2.0, 1.0)
        parts.append((mask.double(), weight.detach() if detach else weight, ce, entropy, is_top))
    alpha = {"none": 1.0, "global": 1.0}.get(normalization)
    if alpha is None:
        together = [[0], [1], [2], [3]] if layout == "data 4" else [[0, 1], [2, 3]]
        inverse = [
            sum(parts[r][0].sum() for r in ranks)
            / sum((parts[r][0] * parts[r][1]).sum() for r in ranks).detach()
            for ranks in together
            if ranks != [certain]  # it has no weight to take the mean of
        ]
        alpha = sum(inverse) / len(inverse)
    for (loss, count, report, grad), (mask, weight, ce, entropy, is_top) in zip(
        results, parts, strict=True
    ):
        expected = alpha * (mask * weight * ce).sum()
        expected.backward()
        assert_within(loss, expected, rtol=1e-6)
        assert count == int(mask.sum())
        assert_within(grad[0], ce.grad, rtol=1e-5, atol=1e-7)
        if entropy.grad is not None:
            assert_within(grad[1], entropy.grad, rtol=1e-5, atol=1e-7)
        assert_within(report["weight"][0], (mask * weight).sum(), rtol=1e-6)
        assert_within(report["cross entropy"][0], (mask * ce).sum(), rtol=1e-6)
        assert_within(report["accuracy"][0], (mask * is_top).sum())
        assert_within(report["objective"][0], expected, rtol=1e-6)
        divisor = (mask * weight).sum() if normalization == "global" else mask.sum()
        assert_within(report["objective"][1], divisor, rtol=1e-6)


COUNTS = [  # settings, all-reduces of one loss
    ({}, 1),
    ({"normalization": "none"}, 0),
    ({"normalization": "global"}, 0),
    ({"objective": "cross_entropy"}, 0),
]


def collectives_on_rank():
    """How many all-reduces a loss of every setting in COUNTS does."""
    from unittest import mock

    from megatron_infoentropy.integration.step import training_loss

    output, mask = make_output(dist.get_rank())
    counted = mock.Mock(wraps=dist.all_reduce)
    counts = []
    with mock.patch.object(dist, "all_reduce", counted):
        for settings, _ in COUNTS:
            training_loss(mask, output, InfoEntropyConfig(**settings), groups_of("data 4"))
            counts.append(counted.call_count - sum(counts))
    return counts


def test_alpha_costs_a_collective_only_where_it_is_not_one():
    for counts in run_forked(collectives_on_rank, 4):
        assert counts == [count for _, count in COUNTS]
