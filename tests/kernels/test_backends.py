"""Every backend against dense float64, through the public function: what is hard to get right.

test_contract.py has both functions at every width and alignment, test_property.py any upstream
gradient, padding and shards.
"""

import math

import pytest
import torch
from close import assert_within, assert_within_bf16_ulp
from oracle import dense_statistics

from megatron_infoentropy import TokenStatistics, vocab_parallel_statistics


def random_case(n, v, dtype=torch.float32, scale=3.0, seed=0):
    generator = torch.Generator().manual_seed(seed + 1000 * v + n)
    logits = (torch.randn(n, v, generator=generator) * scale).to(dtype)
    return logits, torch.randint(0, v, (n,), generator=generator)


def assert_statistics_keep_their_promise(got: TokenStatistics, logits, target, truth=None):
    """The bounds of the error analysis: |dH| <= 1e-5, |dCE| <= 2e-6 + 2.4e-7 CE, and so on."""
    ce, entropy, lse = truth or dense_statistics(logits, target)
    assert_within(got.cross_entropy, ce, atol=2e-6, rtol=2.4e-7)
    assert_within(got.entropy, entropy, atol=1e-5)
    assert_within(got.logsumexp, lse, atol=2e-6, rtol=1.2e-7)
    assert (got.entropy >= 0).all()
    assert (got.entropy <= math.log(logits.shape[-1]) + 1e-6).all()


def exact_gradient(logits, target):
    """p - [y] in float64 with p_y - 1 taken as minus the other probabilities."""
    p = logits.double().softmax(-1)
    others = p.scatter(-1, target.unsqueeze(-1), 0)
    return others.scatter(-1, target.unsqueeze(-1), -others.sum(-1, keepdim=True))


def test_confident_targets_keep_their_gradient(backend):
    """x_y = max + 10, 20, 40, 80: p_y - 1 relative to itself, where softmax - 1 has lost it."""
    logits = torch.randn(4, 4096, generator=torch.Generator().manual_seed(0))
    target = torch.full((4,), 17)
    for row, gap in enumerate((10.0, 20.0, 40.0, 80.0)):
        logits[row, 17] = logits[row].max() + gap
    ours = logits.clone().requires_grad_()
    got = vocab_parallel_statistics(ours, target, backend=backend)
    got.cross_entropy.sum().backward()
    expected = exact_gradient(logits, target)
    assert_within(ours.grad[:, 17], expected[:, 17], rtol=2e-6)
    assert_within(
        got.cross_entropy[:3], dense_statistics(logits, target)[0][:3], rtol=1e-5, atol=1e-14
    )


@pytest.mark.parametrize(
    ("name", "row", "entropy"),
    [
        ("uniform", torch.zeros(4096), math.log(4096)),
        (
            "two-way tie",
            torch.cat([torch.full((2,), 9.0), torch.full((4094,), -200.0)]),
            math.log(2),
        ),
        ("one-hot", torch.cat([torch.tensor([90.0]), torch.full((4095,), -90.0)]), 0.0),
        ("peaked", torch.cat([torch.tensor([3.0]), torch.full((4095,), -15.0)]), None),
        ("all below -110", torch.full((4096,), -113.0), math.log(4096)),
        ("all at +500", torch.full((4096,), 500.0), math.log(4096)),
    ],
)
def test_entropy_of_known_distributions(backend, name, row, entropy):
    logits, target = row.expand(3, -1).contiguous(), torch.tensor([0, 1, 4095])
    got = vocab_parallel_statistics(logits, target, backend=backend)
    assert_statistics_keep_their_promise(got, logits, target)
    if entropy is not None:
        assert_within(got.entropy, torch.full((3,), entropy), atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_bad_logit_spoils_its_own_row_only(backend, value, dtype):
    logits, target = random_case(8, 5000, dtype)
    bad = [1, 3, 4, 6]
    logits[bad, torch.tensor([0, 1, 1500, 4999])] = value
    ours = logits.clone().requires_grad_()
    got = vocab_parallel_statistics(ours, target, backend=backend)
    for part in got[:3]:
        assert part.isnan().nonzero().flatten().tolist() == bad
    got.cross_entropy.sum().backward()
    assert ours.grad.isnan().any(-1).nonzero().flatten().tolist() == bad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_nan_among_minus_infinities_is_not_swallowed(backend, dtype):
    logits = torch.full((4, 3000), -torch.inf, dtype=dtype)
    logits[range(4), torch.tensor([0, 1, 1234, 2999])] = torch.nan
    got = vocab_parallel_statistics(logits, torch.zeros(4).long(), backend=backend)
    assert got.entropy.isnan().all()


def test_a_row_of_only_minus_infinity_is_nan(backend):
    logits = torch.full((1, 3000), -torch.inf)
    assert all(
        x.isnan() for x in vocab_parallel_statistics(logits, torch.tensor([5]), backend=backend)[:2]
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [3.0, 6.0, 8.0, 10.0])
def test_a_softcap_keeps_its_slope_where_it_is_nearly_flat(backend, size, dtype):
    """For the target and a neighbour, both far beyond the cap, where 1 - tanh^2 has no digits."""
    cap, columns = 1.5, [7, 8]
    logits, _ = random_case(4, 40, dtype, scale=1.0)
    far = size * cap * torch.tensor([1.0, -1.0, 1.01, -1.02])
    logits[:, columns] = torch.stack([far, -far.flip(0)], 1).to(dtype)
    target = torch.full((4,), 7)
    ours, truth = logits.clone().requires_grad_(), logits.double().requires_grad_()
    got = vocab_parallel_statistics(ours, target, backend=backend, softcap=cap)
    got.cross_entropy.sum().backward()
    dense_statistics(cap * (truth / cap).tanh(), target)[0].sum().backward()
    if dtype == torch.float32:
        assert_within(ours.grad[:, columns], truth.grad[:, columns], rtol=2e-6)
    else:
        assert_within_bf16_ulp(ours.grad[:, columns], truth.grad[:, columns])


@pytest.mark.parametrize("shape", [(0, 17), (3, 0, 17), (1, 17)])
def test_empty_and_single_inputs(backend, shape):
    logits = torch.randn(shape, requires_grad=True)
    target = torch.zeros(shape[:-1], dtype=torch.long)
    got = vocab_parallel_statistics(logits, target, backend=backend)
    assert got.entropy.shape == target.shape
    got.cross_entropy.sum().backward()
    assert logits.grad.shape == shape


def test_results_do_not_depend_on_the_number_of_threads(backend):
    logits, target = random_case(300, 5000)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            ours = logits.clone().requires_grad_()
            got = vocab_parallel_statistics(ours, target, backend=backend)
            (got.cross_entropy * got.entropy).sum().backward()
            results.append((*got[:4], ours.grad))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_large_gradients_written_around_the_caches_equal_small_ones(backend):
    """Above some size the native kernels stream; odd rows start at every alignment."""
    logits, target = random_case(64, 50257)
    out = []
    for rows in (slice(0, 64), slice(0, 8)):
        ours = logits[rows].clone().requires_grad_()
        vocab_parallel_statistics(
            ours, target[rows], backend=backend
        ).cross_entropy.sum().backward()
        out.append(ours.grad[:8])
    assert torch.equal(*out)
