"""The CUDA kernels on a GPU where they differ from other backends: rows that blocks share, and a
stream of one's own. Skipped by name without a GPU; tests/gpu runs what every backend must do.
"""

import on_gpu
import pytest
import torch
from test_contract import (
    assert_gradient,
    assert_statistics,
    every_dtype,
    every_option,
    make_case,
)

from megatron_infoentropy.kernels import cuda
from megatron_infoentropy.kernels.contract import PLAIN

pytestmark = pytest.mark.gpu


@every_option
@every_dtype
@pytest.mark.parametrize("n", [1, 5, 270])  # 16 blocks a row, some, one
@pytest.mark.parametrize(("v", "offset"), [(33, 1), (8193, 3), (131072, 4), (131075, 5)])
def test_both_functions_equal_float64(v, offset, n, dtype, options):
    kernels = on_gpu.through_gpu(cuda.KERNELS)
    case = make_case(v, dtype, n, offset)
    assert_statistics(kernels, *case, options)
    assert_gradient(kernels, case, options, torch.full((n, v), 7.0, dtype=dtype))
    assert_gradient(kernels, case, options)


def test_the_current_stream_is_the_one_used():
    logits, target, shard = make_case(50257, torch.bfloat16, n=600)
    logits, case = logits.cuda(), (target.cuda(), shard, PLAIN)
    expected = cuda.shard_statistics(logits, *case)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        late = torch.empty_like(logits)
        torch.cuda._sleep(100_000_000)
        late.copy_(logits)
        got = cuda.shard_statistics(late, *case)
    torch.cuda.current_stream().wait_stream(stream)
    assert torch.equal(got, expected)
