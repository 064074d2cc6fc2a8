"""Both functions of every backend against the reference in float64: options, dtypes, alignments.

Vocabularies lie around the widths of a vector, two registers of every instruction set, a warp's
reach, the chunk between looks at the maximum, and a tile. Rows start at every alignment.
"""

import os

import pytest
import torch
from close import assert_within

from megatron_infoentropy.kernels import reference
from megatron_infoentropy.kernels.contract import (
    DISTANCE,
    MAX,
    PLAIN,
    SPREAD,
    TAIL,
    TARGET,
    Options,
    Shard,
)

IS_TRITON_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # milliseconds a row
VOCABULARIES = [1, 5, 7, 8, 9, 15, 16, 17, 31, 33, 63, 1000, 1024, 1031, 2100, 8193, 20011]
if IS_TRITON_INTERPRETED or os.environ.get("INFOENTROPY_KERNELS_ON_GPU") == "1":
    VOCABULARIES = [9, 2047, 2049, 4095, 4097]  # a tile is 8192 bytes
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
OPTIONS = {
    "plain": PLAIN,
    "distance": Options(distance=True),
    "temperature": Options(temperature=0.7),
    "softcap": Options(softcap=30.0),
    "tight softcap": Options(softcap=2.0, temperature=1.5),
    "squares": Options(squares=True),
    "all": Options(softcap=5.0, temperature=0.5, distance=True, squares=True),
}
ROUNDING = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
every_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def random_logits(v, dtype, n=5, offset=0):
    """Rows that begin `offset` elements into wider ones of odd length."""
    generator = torch.Generator().manual_seed(1000 * v + n)
    wide = torch.randn(n, v + 2 * offset + 1 - v % 2, generator=generator) * 4
    return wide.to(dtype)[:, offset : offset + v]


def make_case(v, dtype, n=5, offset=0):
    """Such rows, targets, and a shard with padding where v allows.

    Of the first three rows one has masked logits, one another shard's target, one is ignored. That
    row and the padding hold NaN. For some v the ignored index is that of a token.
    """
    logits = random_logits(v, dtype, n, offset)
    shard = Shard(1000, max(1, v - v // 3), 1000 if v % 3 == 0 else -100)
    generator = torch.Generator().manual_seed(v)
    target = shard.start + torch.randint(0, shard.columns, (n,), generator=generator)
    logits[0, 1::5] = -torch.inf
    if n > 2:
        target[1], target[2] = shard.start + shard.columns, shard.ignore_index
        logits[2] = torch.nan
    logits[:, shard.columns :] = torch.nan
    return logits, target, shard


def whole(v):
    return Shard(0, v, -100)


def assert_statistics(kernels, logits, target, shard, options, inverse=None):
    wide = None if inverse is None else inverse.double()
    truth = reference.shard_statistics(logits.double(), target, shard, options, wide)
    got = kernels.shard_statistics(logits, target, shard, options, inverse)
    assert got.shape == truth.shape
    # A logit that is meant is rounded relative to the cap, or where it is scaled to itself.
    slack = (options.softcap * 2e-7) / options.temperature
    if options.temperature != 1 or inverse is not None:
        slack += 2e-6
    assert_within(got[MAX], truth[MAX], rtol=1.2e-7, atol=slack)
    assert_within(got[TARGET], truth[TARGET], rtol=1.2e-7, atol=slack)
    # A logit d below the maximum: e^d is off by 1.5e-7 |d|, and no more than 2 ulp.
    assert_within(got[TAIL], truth[TAIL], rtol=3e-6 + slack)
    assert_within(got[SPREAD], truth[SPREAD], rtol=3e-6 + slack, atol=slack)
    if options.distance:
        assert_within(got[DISTANCE], truth[DISTANCE], rtol=1e-6, atol=1e-6 + slack)
    if options.squares:
        assert_within(got[-1], truth[-1], rtol=6e-6 + 2 * slack)


def coefficients_for(logits, target, shard, options, inverse=None):
    """Coefficients as the loss makes them, with an entropy term and what else is asked for."""
    wide = None if inverse is None else inverse.double()
    truth = reference.shard_statistics(logits.double(), target, shard, options, wide)
    z = 1 + truth[TAIL]
    upstream = torch.linspace(0.5, 2, len(target), dtype=torch.float64)
    rows = [truth[MAX], upstream / z, -0.3 * upstream / z, -0.9 * upstream]
    rows += [1e-5 * upstream] * options.distance + [0.4 * upstream / z**2] * options.squares
    return torch.stack(rows).float()


def gradient(kernels, logits, target, shard, options, coefficients, inverse=None):
    out = torch.full_like(logits, torch.nan)
    kernels.shard_gradient(logits, target, shard, options, coefficients, out, inverse)
    return out


def assert_gradient(kernels, case, options, out=None, inverse=None):
    """Into `out`, by default over the logits; what lies around its rows stays as it is."""
    logits, target, shard = case
    out = logits if out is None else out
    coefficients = coefficients_for(*case, options, inverse)
    wide = None if inverse is None else inverse.double()
    truth = gradient(
        reference, logits.double(), target, shard, options, coefficients.double(), wide
    )
    memory = out if out._base is None else out._base
    around = memory.clone()
    kernels.shard_gradient(logits, target, shard, options, coefficients, out, inverse)
    scale = coefficients[1:3].abs().sum(0).double().unsqueeze(-1) + 1e-5 + options.softcap * 1e-6
    if options.squares:
        scale = scale + coefficients[-1].abs().double().unsqueeze(-1)
    rounding, floor = 2e-6 + ROUNDING[out.dtype], 2.0**-25
    assert_within(out, truth, rtol=rounding, atol=3e-6 * scale + floor)
    column = target - shard.start
    owned = (target != shard.ignore_index) & (column >= 0) & (column < shard.columns)
    own, exact = out[owned, column[owned]], truth[owned, column[owned]]
    if options.softcap:
        assert_within(own, exact, rtol=1.1 * rounding, atol=1.1 * floor)
    else:
        assert torch.equal(own, exact.to(out.dtype))
    ignored = out[target == shard.ignore_index]
    assert torch.equal(ignored, torch.zeros_like(ignored))
    assert not out[:, shard.columns :].any()
    first = out.storage_offset() % out.stride(0)
    last = first + out.shape[1]
    assert torch.equal(memory[:, :first], around[:, :first])
    assert torch.equal(memory[:, last:], around[:, last:])


@every_option
@every_dtype
def test_statistics_of_any_vocabulary_and_alignment(kernels, dtype, options):
    for v in VOCABULARIES:
        for offset in (0, 3):
            assert_statistics(kernels, *make_case(v, dtype, offset=offset), options)


@every_option
@every_dtype
@pytest.mark.parametrize("place", ["same alignment", "other alignment", "in place"])
def test_gradient_of_any_vocabulary_and_alignment(kernels, dtype, options, place):
    for v in VOCABULARIES[:-1]:
        case = make_case(v, dtype, offset=3)
        wide = torch.full((5, case[0].stride(0)), 7.0, dtype=dtype)
        start = 4 if place == "other alignment" else 3
        out = None if place == "in place" else wide[:, start : start + v]
        assert_gradient(kernels, case, options, out)


@pytest.mark.parametrize("name", ["plain", "softcap", "all"])
def test_every_token_may_have_its_own_temperature(kernels, name):
    """Those that all tokens share are left out: as in the reference with the same."""
    options, case = (
        OPTIONS[name]._replace(temperature=1.0),
        make_case(1100, torch.float32, n=9, offset=1),
    )
    inverse = torch.linspace(0.3, 3, 9).reciprocal()
    assert_statistics(kernels, *case, options, inverse)
    assert_gradient(kernels, case, options, inverse=inverse)


@every_option
@every_dtype
def test_masked_logits_stay_masked(kernels, dtype, options):
    v = 2500 if IS_TRITON_INTERPRETED else 20011
    logits, target = random_logits(v, dtype, offset=1), torch.tensor([0, 1, 3, v - 1, 5])
    logits[0] = -torch.inf
    logits[1, : v // 2] = -torch.inf
    logits[2, 1::2] = -torch.inf
    logits[3, : v - 1] = -torch.inf
    logits[4, 5] = -torch.inf
    shard = whole(v)
    assert_statistics(kernels, logits, target, shard, options)
    got = kernels.shard_statistics(logits, target, shard, options)
    assert got[:3, 0].tolist() == [-torch.inf, -1, 0]
    assert got[1:3, 3].tolist() == [0, 0]
    if options.distance:
        assert got[DISTANCE].tolist() == [0, *[torch.inf] * 4]
    if options.squares:
        assert got[-1, [0, 3]].tolist() == [-1, 0]
    masked = (logits == -torch.inf).scatter(-1, target.unsqueeze(-1), False)[1:]
    case = (logits[1:], target[1:], shard)
    assert_gradient(kernels, case, options)
    dz = logits[1:]
    rest = coefficients_for(*case, options)[4].to(dtype) if options.distance else torch.zeros(4)
    expected = torch.zeros(4) if options.softcap else rest
    assert torch.equal(dz[masked], expected.to(dtype).unsqueeze(-1).expand_as(dz)[masked])


@every_option
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_bad_logit_spoils_its_own_row_only(kernels, options, value):
    logits = random_logits(2500, torch.float32)
    logits[1, 2400] = value
    got = kernels.shard_statistics(logits, torch.arange(5), whole(2500), options)
    is_cap = options.softcap and value == torch.inf  # which is no mistake under a softcap
    assert got[TAIL].isnan().tolist() == [False, not is_cap, False, False, False]
    assert got[:, [0, 2, 3, 4]].isfinite().all()


@pytest.mark.parametrize("softcap", [0.01, 1.0, 30.0, 1e4])
def test_a_capped_logit_is_right_to_its_last_digits(kernels, softcap):
    """Through rows of one logit: MAX is the capped logit. Relative where tanh is nearly linear."""
    size = torch.logspace(-6, 1.3, 20001, dtype=torch.float64)
    z = (torch.cat([-size, size, torch.zeros(1)]) * softcap).float().unsqueeze(-1)
    target = torch.zeros(len(z), dtype=torch.long)
    got = kernels.shard_statistics(z, target, whole(1), Options(softcap=softcap))
    want = (z.double() / softcap).tanh().squeeze(-1) * softcap
    assert_within(got[MAX], want, atol=1.6e-7 * softcap)
    assert_within(got[MAX], want, rtol=1.5e-6)
    assert torch.equal(got[MAX], got[TARGET])


@pytest.mark.parametrize("offset", [300.0, 65000.0, 65600.0, 3e6, -3e6, 1e30, -3e38])
def test_logits_however_far_from_zero_lose_nothing(kernels, offset):
    """Beyond some size fused exponents would; a mask of large finite numbers is such a row."""
    v = 1100
    step = max(torch.finfo(torch.float32).eps * abs(offset), 1 / 64)
    small = torch.arange(v) % 7
    logits = (small * step + offset).float().expand(3, v).contiguous()
    target, options = torch.tensor([0, 3, 1099]), Options(distance=True)
    got = kernels.shard_statistics(logits, target, whole(v), options)
    want = reference.shard_statistics(logits.double(), target, whole(v), options)
    assert_within(got, want, atol=1e-5, rtol=2e-6)
    coefficients = torch.tensor([[0.0], [0.3], [0.2], [0.1]]).expand(4, 3).contiguous()
    coefficients[0] = logits[0].max()
    dz = gradient(kernels, logits, target, whole(v), PLAIN, coefficients)
    truth = gradient(reference, logits.double(), target, whole(v), PLAIN, coefficients.double())
    assert_within(dz, truth, atol=1e-6)


def test_every_float16_is_read_as_it_is(kernels):
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.float16)
    every = every[~every.isnan() & (every != torch.inf)].unsqueeze(-1)
    target = torch.zeros(len(every), dtype=torch.long)
    got = kernels.shard_statistics(every, target, whole(1), PLAIN)
    assert torch.equal(got[MAX], every.squeeze(-1).float())


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_16_bit_gradients_are_rounded_to_nearest_even(kernels, dtype):
    generator = torch.Generator().manual_seed(0)
    value = torch.randn(40000, generator=generator)
    if dtype == torch.float16:  # from below its subnormals to beyond its largest
        value *= torch.logspace(-9, 6, 40000)
    else:
        value[:20000] = (value[:20000].view(torch.int32) & -65536 | 0x8000).view(torch.float32)
    coefficients = torch.stack([torch.zeros(40000), value, torch.zeros(40000), value])
    target = torch.ones(40000, dtype=torch.long)
    dz = gradient(
        kernels, torch.zeros(40000, 2, dtype=dtype), target, whole(2), PLAIN, coefficients
    )
    assert torch.equal(dz, value.to(dtype).unsqueeze(-1).expand(-1, 2))


@every_dtype
def test_all_negative_and_mixed_signs_find_their_maximum(kernels, dtype):
    """16-bit maxima are taken on the bits, where the order of negative numbers is reversed."""
    generator = torch.Generator().manual_seed(5)
    logits = torch.randn(64, 1100, generator=generator) * 3
    logits[:32] = -logits[:32].abs() - 0.01
    logits[7] = -0.0
    logits[8, 3] = 0.0
    logits = logits.to(dtype)
    got = kernels.shard_statistics(logits, torch.zeros(64).long(), whole(1100), PLAIN)
    assert torch.equal(got[MAX], logits.float().max(-1).values)
    assert torch.equal(got[TARGET], logits[:, 0].float())


# A GPU's own NaN, both signs; payloads in the lower half alone, both signs; the usual one.
NANS = torch.tensor([0x7FFFFFFF, -1, 0x7F800001, -0x7F8001, 0x7FC00000], dtype=torch.int32)


@every_option
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_a_nan_of_any_bits_stays_one_in_a_16_bit_gradient(kernels, dtype, options):
    """Wherever it enters: by a coefficient, of any bits, or by a logit, of any bits."""
    for row in range(options.rows):
        coefficients = torch.full((options.rows, len(NANS)), 0.25)
        coefficients[row] = NANS.view(torch.float32)
        logits, target = torch.ones(len(NANS), 70, dtype=dtype), torch.full((len(NANS),), 3)
        dz = gradient(kernels, logits, target, whole(70), options, coefficients)
        spoilt = dz[:, 3:4] if row == 3 else dz[:, torch.arange(70) != 3]
        assert spoilt.isnan().all(), f"row {row} of the coefficients"
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    logits = every[every.isnan()].unsqueeze(-1)
    target = torch.full((len(logits),), -1)  # another shard's
    coefficients = torch.full((options.rows, len(logits)), 0.25)
    dz = gradient(kernels, logits, target, whole(1), options, coefficients)
    assert dz.isnan().all(), "a logit"
