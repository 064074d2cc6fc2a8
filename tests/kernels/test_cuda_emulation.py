"""What only the CUDA kernels do, walked thread by thread on the CPU: rows that blocks share.

`cuda_emulation` says what that cannot see; tests/gpu runs the kernels themselves.
"""

import functools

import cuda_emulation
import pytest
import torch
from close import assert_within_bf16_ulp
from test_contract import assert_statistics, every_option, gradient, make_case, random_logits, whole

from megatron_infoentropy.kernels import reference
from megatron_infoentropy.kernels.contract import MAX, PLAIN, TAIL, TARGET, Kernels


@every_option
@pytest.mark.parametrize("splits", [2, 3, 7, 32])
def test_blocks_that_share_a_row_find_what_one_finds(splits, options):
    shared = functools.partial(cuda_emulation.shard_statistics, splits=splits)
    logits, target, shard = make_case(50257, torch.bfloat16, offset=5)
    logits[3, : 50257 // 2] = -torch.inf  # of whole blocks
    logits[4] = -torch.inf
    kernels = Kernels("cuda", shared, cuda_emulation.shard_gradient)
    assert_statistics(kernels, logits, target, shard, options)


def test_every_column_is_read_once():
    """With equal logits TAIL counts the columns; with one high logit MAX finds it anywhere."""
    for v in (*range(1, 70), 8192 + 9, 3 * 8192 + 5):
        logits, target = torch.full((2, v), -3.0, dtype=torch.bfloat16), torch.zeros(2).long()
        got = cuda_emulation.shard_statistics(logits, target, whole(v), PLAIN, splits=2)
        assert got[TAIL].tolist() == [v - 1, v - 1]
    v = 1021
    logits = torch.eye(v, dtype=torch.bfloat16) * 9
    got = cuda_emulation.shard_statistics(logits, torch.arange(v), whole(v), PLAIN)
    assert got[MAX].eq(9).all()
    assert got[TARGET].eq(9).all()


def test_a_bf16_gradient_is_rounded_once_down_to_the_smallest_step():
    logits, target = random_logits(4001, torch.bfloat16, offset=1), torch.arange(5)
    logits[0, 40] = 80.0  # probabilities below 2^-126, which bf16 still has
    logits[1, 40] = 95.0
    truth = reference.shard_statistics(logits.double(), target, whole(4001), PLAIN)
    rows = [truth[MAX], 1 / (1 + truth[TAIL]), torch.zeros(5), torch.full((5,), -0.123456789)]
    coefficients = torch.stack(rows).float()
    case = (target, whole(4001), PLAIN)
    got = gradient(cuda_emulation, logits, *case, coefficients)
    expected = gradient(reference, logits.double(), *case, coefficients.double())
    assert_within_bf16_ulp(got, expected)
    assert (got == expected.to(torch.bfloat16)).double().mean() >= 0.99
    assert (got[0] != 0).double().mean() > 0.99
    assert got[0].abs().min() < 2.0**-126
