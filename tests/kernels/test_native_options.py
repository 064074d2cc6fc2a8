"""The native kernels against the reference in float64: every option, every dtype, row by row.

Vocabularies around two registers of every instruction set and around the chunk between looks at
the maximum.
"""

import platform

import pytest
import torch
from close import assert_within, assert_within_bf16_ulp

from megatron_infoentropy.kernels import native, reference
from megatron_infoentropy.kernels.contract import (
    DISTANCE,
    MAX,
    SPREAD,
    TAIL,
    TARGET,
    Options,
    Shard,
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
VOCABULARIES = [1, 5, 8, 15, 16, 17, 31, 33, 63, 1024, 1031, 2100]
OPTIONS = {
    "plain": Options(),
    "distance": Options(distance=True),
    "temperature": Options(temperature=0.7),
    "softcap": Options(softcap=30.0),
    "tight softcap": Options(softcap=2.0, temperature=1.5),
    "squares": Options(squares=True),
    "all": Options(softcap=5.0, temperature=0.5, distance=True, squares=True),
}
EVERY_OPTION = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


def random_case(v, dtype, n=9):
    generator = torch.Generator().manual_seed(v)
    logits = (torch.randn(n, v, generator=generator) * 4).to(dtype)
    target = torch.randint(0, v, (n,), generator=generator)
    target[n // 2] = -100
    return logits, target, Shard(0, v, -100)


def random_coefficients(logits, target, shard, options):
    """Of the size that losses have: the true maximum, and the others of order one."""
    statistics = reference.shard_statistics(logits.double(), target, shard, options)
    generator = torch.Generator().manual_seed(1)
    coefficients = torch.randn(options.rows, len(target), generator=generator)
    coefficients[MAX] = statistics[MAX].float()
    return coefficients


def gradient(kernels, logits, target, shard, options, coefficients):
    out = torch.full_like(logits, torch.nan)
    kernels.shard_gradient(logits, target, shard, options, coefficients, out)
    return out


def test_every_instruction_set_of_this_architecture_runs_here():
    known = ["avx512", "avx2", "baseline"] if platform.machine() == "x86_64" else ["baseline"]
    here = native._C.instruction_sets()
    assert here == [name for name in known if name in here]
    if here != known:
        pytest.skip(f"this processor lacks {', '.join(set(known) - set(here))}: not run")


@EVERY_OPTION
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_both_functions_equal_the_reference(instructions, dtype, options):
    for v in VOCABULARIES:
        case = random_case(v, dtype)
        assert_statistics_equal_the_reference(native, *case, options)
        assert_gradient_equals_the_reference(native, *case, options)


def assert_statistics_equal_the_reference(kernels, logits, target, shard, options):
    got = kernels.shard_statistics(logits, target, shard, options)
    want = reference.shard_statistics(logits.double(), target, shard, options)
    assert got.shape == want.shape
    bound = options.softcap or 20.0  # of a logit: what its rounding is relative to
    rounding = 2.4e-7 * bound / options.temperature
    for row in (MAX, TARGET):
        assert_within(got[row], want[row], atol=rounding)
    mass = 1 + want[TAIL]
    assert_within(got[TAIL] / mass, want[TAIL] / mass, atol=2e-7 + 2 * rounding)
    assert_within(got[SPREAD] / mass, want[SPREAD] / mass, atol=1e-6 + 20 * rounding)
    if options.distance:
        v = shard.columns
        assert_within(got[DISTANCE] / v, want[DISTANCE] / v, atol=2 * rounding, rtol=1e-6)
    if options.squares:
        assert_within(got[-1] / mass**2, want[-1] / mass**2, atol=4e-7 + 4 * rounding)


def assert_every_token_has_its_own_temperature(kernels, options):
    """As in calls of one row with that temperature for all."""
    logits, target, shard = random_case(1100, torch.float32)
    temperatures = torch.linspace(0.3, 3, len(logits))
    inverse = temperatures.reciprocal()
    coefficients = random_coefficients(logits, target, shard, options)
    together = kernels.shard_statistics(logits, target, shard, options, inverse)
    dz = torch.full_like(logits, torch.nan)
    kernels.shard_gradient(logits, target, shard, options, coefficients, dz, inverse)
    for i, temperature in enumerate(temperatures.tolist()):
        alone = options._replace(temperature=temperature)
        row = (logits[i : i + 1], target[i : i + 1], shard, alone)
        assert_within(together[:, i : i + 1], kernels.shard_statistics(*row).double(), rtol=2e-6)
        expected = gradient(kernels, *row, coefficients[:, i : i + 1].contiguous())
        assert_within(dz[i : i + 1], expected.double(), atol=2e-5)


@pytest.mark.parametrize("name", ["plain", "softcap", "all"])
def test_every_token_may_have_its_own_temperature(instructions, name):
    assert_every_token_has_its_own_temperature(native, OPTIONS[name])


def assert_gradient_equals_the_reference(kernels, logits, target, shard, options):
    coefficients = random_coefficients(logits, target, shard, options)
    got = gradient(kernels, logits, target, shard, options, coefficients)
    want = gradient(reference, logits.double(), target, shard, options, coefficients.double())
    step = 2e-7 * (options.softcap or 20.0) / options.temperature  # of a probability, relative
    rounding = 1.1 * torch.finfo(logits.dtype).eps / 2
    floor = 2e-7
    if kernels is native:  # whose exponential is better than a GPU's
        rounding = 0.0 if logits.dtype == torch.float32 else torch.finfo(logits.dtype).eps / 2
        floor = 6e-8 if logits.dtype == torch.float16 else 2e-7
    # a + b d changes sign: the error is relative to its parts, which reach 20 times a coefficient.
    atol = floor + 20 * step * float(coefficients.abs().max())
    assert_within(got, want, atol=atol, rtol=rounding)
    column = target - shard.start
    kept = (target != shard.ignore_index) & (column >= 0) & (column < shard.columns)
    own, truth = got[kept, column[kept]], want[kept, column[kept]]
    if options.softcap:
        half_a_step = torch.finfo(logits.dtype).tiny * torch.finfo(logits.dtype).eps / 2
        assert_within(own, truth, rtol=rounding + 2e-6, atol=1.1 * half_a_step)
    else:
        assert torch.equal(own, truth.to(logits.dtype))
    assert torch.equal(got[target == shard.ignore_index], torch.zeros_like(got[:1]))
    assert not got[:, shard.columns :].any()


@pytest.mark.parametrize("softcap", [0.01, 1.0, 30.0, 1e4])
def test_a_softcap_is_the_tanh_to_the_last_digits(instructions, softcap):
    """Through rows of one logit: MAX is the capped logit. Relative where tanh is nearly linear."""
    size = torch.logspace(-6, 1.3, 20001, dtype=torch.float64)
    z = (torch.cat([-size, size, torch.zeros(1)]) * softcap).float().unsqueeze(-1)
    target = torch.zeros(len(z), dtype=torch.long)
    got = native.shard_statistics(z, target, Shard(0, 1, -100), Options(softcap=softcap))
    want = (z.double() / softcap).tanh().squeeze(-1) * softcap
    assert_within(got[MAX], want, atol=1.5e-7 * softcap, rtol=0.0)
    assert_within(got[MAX], want, atol=0.0, rtol=1.5e-6)
    assert torch.equal(got[MAX], got[TARGET])


@EVERY_OPTION
def test_masked_logits_stay_masked(instructions, options):
    assert_masked_logits_stay_masked(native, options)


def assert_masked_logits_stay_masked(kernels, options):
    v = 2500
    logits = torch.randn(5, v, generator=torch.Generator().manual_seed(2))
    logits[0] = -torch.inf
    logits[1, :2100] = -torch.inf
    logits[2, 1::2] = -torch.inf
    logits[3, : v - 1] = -torch.inf
    target, shard = torch.tensor([0, 1, 3, v - 1, 5]), Shard(0, v, -100)
    got = kernels.shard_statistics(logits, target, shard, options)
    want = reference.shard_statistics(logits.double(), target, shard, options)
    assert got[:3, 0].tolist() == [-torch.inf, -1, 0]
    assert got[1:3, 3].tolist() == [0, 0]
    assert_within(got[:, 1:], want[:, 1:], atol=1e-4, rtol=1e-6)
    if options.distance:
        assert got[DISTANCE, :4].tolist() == [0, torch.inf, torch.inf, torch.inf]
    if options.squares:
        assert got[-1, [0, 3]].tolist() == [-1, 0]
    coefficients = random_coefficients(logits, target, shard, options)
    dz = gradient(kernels, logits, target, shard, options, coefficients)[1:4]
    truth = gradient(reference, logits.double(), target, shard, options, coefficients.double())[1:4]
    assert_within(dz, truth, atol=2e-4)
    masked = (logits[1:4] == -torch.inf).scatter(-1, target[1:4, None], False)
    rest = coefficients[4, 1:4, None].expand_as(dz) if options.distance else torch.zeros_like(dz)
    assert torch.equal(
        dz[masked], torch.zeros_like(rest)[masked] if options.softcap else rest[masked]
    )


@pytest.mark.parametrize("offset", [300.0, 65000.0, 65600.0, 3e6, -3e6, 1e30, -3e38])
def test_logits_however_far_from_zero_lose_nothing(instructions, offset):
    """Beyond some size the fused exponents would; a mask of large finite numbers is such a row."""
    v = 1100
    step = max(torch.finfo(torch.float32).eps * abs(offset), 1 / 64)
    small = torch.arange(v) % 7
    logits = (small * step + offset).float()
    exact = logits.double().expand(3, v).contiguous()
    logits = logits.expand(3, v).contiguous()
    target, shard = torch.tensor([0, 3, 1099]), Shard(0, v, -100)
    got = native.shard_statistics(logits, target, shard, Options(distance=True))
    want = reference.shard_statistics(exact, target, shard, Options(distance=True))
    assert_within(got, want, atol=1e-5, rtol=2e-6)
    coefficients = torch.tensor([[0.0], [0.3], [0.2], [0.1]]).expand(4, 3).contiguous()
    coefficients[0] = logits[0].max()
    dz = gradient(native, logits, target, shard, Options(), coefficients)
    truth = gradient(reference, exact, target, shard, Options(), coefficients.double())
    assert_within(dz, truth, atol=1e-6)


def test_float16_keeps_its_subnormals_and_its_largest(instructions):
    """Every float16 through MAX of a row of one, and every gradient rounded as torch rounds it."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.float16)
    every = every[~every.isnan() & (every != torch.inf)].unsqueeze(-1)
    target = torch.zeros(len(every), dtype=torch.long)
    got = native.shard_statistics(every, target, Shard(0, 1, -100), Options())
    assert torch.equal(got[MAX], every.squeeze(-1).float())

    generator = torch.Generator().manual_seed(0)
    value = torch.randn(40000, generator=generator) * torch.logspace(-9, 6, 40000)
    coefficients = torch.stack([torch.zeros(40000), value, torch.zeros(40000), value])
    flat = torch.zeros(40000, 2, dtype=torch.float16)
    target = torch.ones(40000, dtype=torch.long)
    dz = gradient(native, flat, target, Shard(0, 2, -100), Options(), coefficients)
    assert torch.equal(dz, value.to(torch.float16).unsqueeze(-1).expand(-1, 2))


def test_bf16_gradients_are_rounded_to_nearest_even(instructions):
    generator = torch.Generator().manual_seed(0)
    value = torch.randn(40000, generator=generator)
    value[:20000] = (value[:20000].view(torch.int32) & -65536 | 0x8000).view(torch.float32)  # ties
    coefficients = torch.stack([torch.zeros(40000), value, torch.zeros(40000), value])
    flat = torch.zeros(40000, 2, dtype=torch.bfloat16)
    target = torch.ones(40000, dtype=torch.long)
    dz = gradient(native, flat, target, Shard(0, 2, -100), Options(), coefficients)
    assert torch.equal(dz, value.bfloat16().unsqueeze(-1).expand(-1, 2))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_all_negative_and_mixed_signs_find_their_maximum(instructions, dtype):
    """16-bit maxima are taken on the bits, where the order of negative numbers is reversed."""
    generator = torch.Generator().manual_seed(5)
    logits = torch.randn(64, 1100, generator=generator) * 3
    logits[:32] = -logits[:32].abs() - 0.01
    logits[7] = -0.0
    logits[8, 3] = 0.0
    logits = logits.to(dtype)
    target = torch.zeros(64, dtype=torch.long)
    got = native.shard_statistics(logits, target, Shard(0, 1100, -100), Options())
    assert torch.equal(got[MAX], logits.float().max(-1).values)
    assert_within_bf16_ulp(got[TARGET].bfloat16(), logits[:, 0].double())


# A GPU's own NaN, both signs; payloads in the lower half alone, both signs; the usual one.
NANS = torch.tensor([0x7FFFFFFF, -1, 0x7F800001, -0x7F8001, 0x7FC00000], dtype=torch.int32)


def assert_a_nan_stays_one(kernels, dtype, options):
    """Wherever it enters: by a coefficient, of any bits, or by a logit, of any bits."""
    for row in range(options.rows):
        coefficients = torch.full((options.rows, len(NANS)), 0.25)
        coefficients[row] = NANS.view(torch.float32)
        logits, target = torch.ones(len(NANS), 70, dtype=dtype), torch.full((len(NANS),), 3)
        dz = gradient(kernels, logits, target, Shard(0, 70, -100), options, coefficients)
        spoilt = dz[:, 3:4] if row == 3 else dz[:, torch.arange(70) != 3]
        assert spoilt.isnan().all(), f"row {row} of the coefficients"
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    logits = every[every.isnan()].unsqueeze(-1)
    target = torch.full((len(logits),), -1)  # another shard's
    coefficients = torch.full((options.rows, len(logits)), 0.25)
    dz = gradient(kernels, logits, target, Shard(0, 1, -100), options, coefficients)
    assert dz.isnan().all(), "a logit"


@EVERY_OPTION
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_a_nan_of_any_bits_stays_one_in_a_16_bit_gradient(instructions, dtype, options):
    assert_a_nan_stays_one(native, dtype, options)
