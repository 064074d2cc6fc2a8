"""The CUDA kernels on a GPU against float64, where they differ from other backends: rows at every
alignment, rows shared by blocks, in place, on a stream of one's own. Skipped by name without a GPU.

tests/gpu runs what every backend must do.
"""

import pytest
import torch
from close import assert_within
from test_cuda_emulation import (
    OPTIONS,
    ROUNDING,
    assert_statistics,
    coefficients_for,
    random_case,
    whole,
)

from megatron_infoentropy.kernels import cuda, native, reference

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("dtype", native.DTYPES, ids=str)
@pytest.mark.parametrize("n", [1, 5, 270])  # 16 blocks a row, some, one
@pytest.mark.parametrize(("v", "offset"), [(33, 1), (8193, 3), (131072, 0), (131075, 5)])
def test_both_functions_equal_float64(v, offset, n, dtype, options):
    logits, target = random_case(n, v, dtype, offset=offset)
    logits, target = logits._base.cuda()[:, offset : offset + v], target.cuda()
    target[n // 2] = -100
    shard = whole(v)
    got = cuda.shard_statistics(logits, target, shard, options)
    assert_statistics(got, logits, target, shard, options)
    coefficients = coefficients_for(logits, target, shard, options)
    truth = torch.empty(n, v, dtype=torch.float64, device="cuda")
    reference.shard_gradient(logits.double(), target, shard, options, coefficients.double(), truth)
    scale = coefficients[1:3].abs().sum(0).double().unsqueeze(-1) + 1e-5 + options.softcap * 1e-6
    slack = 3e-6 * scale.cpu() + 2.0**-25
    for out in (torch.full((n, v), 7.0, dtype=dtype, device="cuda"), logits):  # then in place
        cuda.shard_gradient(logits, target, shard, options, coefficients, out)
        assert_within(out, truth, rtol=2e-6 + ROUNDING[dtype], atol=slack)


def test_the_current_stream_is_the_one_used():
    logits, target = random_case(600, 50257, torch.bfloat16)
    on_gpu, its_target = logits.cuda(), target.cuda()
    expected = cuda.shard_statistics(on_gpu, its_target, whole(50257), OPTIONS["plain"])
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        late = torch.empty_like(on_gpu)
        torch.cuda._sleep(100_000_000)
        late.copy_(on_gpu)
        got = cuda.shard_statistics(late, its_target, whole(50257), OPTIONS["plain"])
    torch.cuda.current_stream().wait_stream(stream)
    assert torch.equal(got, expected)
