"""What only the Triton kernels do: launch parameters, rows anywhere, and the softcap's tanh.

Run by test_triton_interpreted.py. Vocabularies lie around a tile, which is 8192 bytes of a row.
"""

import pytest
import torch
import triton
import triton.language as tl
from close import assert_within
from test_contract import (
    assert_gradient,
    assert_statistics,
    coefficients_for,
    every_dtype,
    gradient,
    make_case,
    random_logits,
    whole,
)

from megatron_infoentropy.kernels import reference, triton_kernels
from megatron_infoentropy.kernels.contract import PLAIN, SPREAD, TAIL, Options
from megatron_infoentropy.kernels.triton_device import meaning

TILE_BYTES = 8192


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """The launch parameters of a GPU: a thread takes 64 bytes at once instead of 16."""
    monkeypatch.setattr(triton_kernels, "THREADS", 128)
    monkeypatch.setattr(triton_kernels, "LOADS", 4)


@every_dtype
@pytest.mark.parametrize("beside", [-1, 0, 1])
def test_the_launch_parameters_of_a_gpu(as_on_a_gpu, beside, dtype):
    v, distance = 2 * TILE_BYTES // dtype.itemsize + beside, Options(distance=True)
    logits, target, shard = make_case(v, dtype, n=3)
    assert_statistics(triton_kernels, logits.contiguous(), target, shard, PLAIN)
    assert_gradient(triton_kernels, (logits, target, shard), distance)


def test_a_large_odd_vocabulary_as_on_a_gpu(as_on_a_gpu):
    case = make_case(50257, torch.bfloat16, n=2, offset=1)
    assert_statistics(triton_kernels, *case, Options(distance=True))
    assert_gradient(triton_kernels, case, PLAIN)


@every_dtype
@pytest.mark.parametrize(("first", "gap"), [(0, 8), (1, 0), (5, 3), (8, 1)])
def test_rows_anywhere_in_memory_read_alike(dtype, first, gap):
    """Vectors of 16 bytes where rows start at such boundaries, single logits where they do not."""
    v, options = TILE_BYTES // dtype.itemsize + 40, Options(distance=True)
    logits, target, shard = random_logits(v, dtype, n=3).contiguous(), torch.arange(3), whole(v)
    wide = torch.full((3, first + v + gap), torch.nan, dtype=dtype)
    moved = wide[:, first : first + v]
    moved.copy_(logits)
    plain = triton_kernels.shard_statistics(logits, target, shard, options)
    assert torch.equal(triton_kernels.shard_statistics(moved, target, shard, options), plain)

    case, coefficients = (target, shard, PLAIN), coefficients_for(logits, target, shard, PLAIN)
    want = gradient(triton_kernels, logits, *case, coefficients)
    out = torch.full((3, v + 7), 7.0, dtype=dtype)
    for source, sink in ((moved, out[:, 1 : v + 1]), (logits, out[:, 1 : v + 1]), (moved, moved)):
        triton_kernels.shard_gradient(source, *case, coefficients, sink)
        assert torch.equal(sink, want)
    assert (out[:, 0] == 7).all()
    assert (out[:, v + 1 :] == 7).all()
    assert wide[:, :first].isnan().all()
    assert wide[:, first + v :].isnan().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_long_sums_of_equal_terms_do_not_drift(as_on_a_gpu, dtype):
    """Every thread rounds alike, so that errors add up instead of averaging out."""
    v = 262144 if dtype == torch.bfloat16 else 100000
    logits = torch.full((1, v), -0.41, dtype=dtype)
    logits[0, 77] = 1.0
    case = (torch.tensor([77]), whole(v), PLAIN)
    got = triton_kernels.shard_statistics(logits, *case).double()
    want = reference.shard_statistics(logits.double(), *case)
    assert_within(got[TAIL].log1p(), want[TAIL].log1p(), atol=1e-6)
    assert_within(got[SPREAD] / got[TAIL], want[SPREAD] / want[TAIL], atol=2e-6)


@triton.jit
def capped_kernel(z, capped, slope, cap_high, cap_low, softcap, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    x, s = meaning(tl.load(z + at), (cap_high, cap_low), True)
    tl.store(capped + at, x * softcap)
    tl.store(slope + at, s)


@pytest.mark.parametrize("softcap", [0.01, 1.0, 30.0, 1e4])
def test_a_softcap_is_the_tanh_to_the_last_digits(softcap):
    size = torch.logspace(-6, 1.5, 2**19, dtype=torch.float64)
    z = (torch.cat([-size, size]) * softcap).float()
    capped, slope = torch.empty_like(z), torch.empty_like(z)
    rate = triton_kernels._softcap_rate(Options(softcap=softcap))
    capped_kernel[(1,)](z, capped, slope, *rate, softcap, SIZE=2**20)
    want = (z.double() / softcap).tanh() * softcap
    assert_within(capped, want, atol=1.6e-7 * softcap)
    assert_within(capped, want, rtol=5e-7)
    assert_within(slope, 1 / (z.double() / softcap).cosh() ** 2, rtol=1e-5, atol=1e-30)
