"""The CUDA kernels' slicing and arithmetic, walked thread by thread on the CPU, against float64.

`cuda_emulation` says what that cannot see; tests/gpu runs the kernels themselves. The grid:
vocabularies around the widths of a vector, a warp's reach and a batch, each dtype, rows that start
at every alignment.
"""

import cuda_emulation
import pytest
import test_backends
import test_promises
import test_property
import torch
from close import assert_within, assert_within_bf16_ulp
from test_native_options import (
    assert_a_nan_stays_one,
    assert_every_token_has_its_own_temperature,
)

from megatron_infoentropy.kernels import dispatch, reference
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

VOCABULARIES = [1, 7, 8, 9, 33, 1000, 8193, 20011]
OPTIONS = {
    "plain": PLAIN,
    "distance": Options(distance=True),
    "temperature": Options(temperature=0.7),
    "squares": Options(squares=True),
    "softcap": Options(softcap=30.0, temperature=1.3, distance=True, squares=True),
}
ROUNDING = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
every_dtype = pytest.mark.parametrize("dtype", cuda_emulation.DTYPES, ids=str)
every_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


def random_case(n, v, dtype, scale=4.0, offset=0):
    """Logits whose rows start `offset` elements into wider rows of odd length."""
    generator = torch.Generator().manual_seed(1000 * v + n)
    wide = torch.randn(n, v + 2 * offset + 1 - v % 2, generator=generator) * scale
    logits = wide.to(dtype)[:, offset : offset + v]
    return logits, torch.randint(0, v, (n,), generator=generator)


def whole(v):
    return Shard(0, v, -100)


def assert_statistics(got, logits, target, shard, options):
    truth = reference.shard_statistics(logits.double(), target, shard, options)
    # A softcap costs the rounding of z / softcap and of tanh, both relative to the cap.
    slack = options.softcap * 2e-7
    assert_within(got[MAX], truth[MAX], rtol=1.2e-7, atol=slack)
    assert_within(got[TARGET], truth[TARGET], rtol=1.2e-7, atol=slack)
    # A logit d below the maximum: e^d is off by 1.5e-7 |d|, and no more than 2 ulp.
    assert_within(got[TAIL], truth[TAIL], rtol=3e-6 + slack)
    assert_within(got[SPREAD], truth[SPREAD], rtol=3e-6 + slack, atol=slack)
    if options.distance:
        assert_within(got[DISTANCE], truth[DISTANCE], rtol=1e-6, atol=1e-6 + slack)
    if options.squares:
        assert_within(got[-1], truth[-1], rtol=6e-6 + 2 * slack)


@pytest.mark.parametrize("name", ["plain", "softcap"])
def test_every_token_may_have_its_own_temperature(name):
    assert_every_token_has_its_own_temperature(cuda_emulation, OPTIONS[name])


@every_option
@every_dtype
def test_statistics_of_any_vocabulary_and_alignment(dtype, options):
    for v in VOCABULARIES:
        for offset in (0, 3):
            logits, target = random_case(3, v, dtype, offset=offset)
            got = cuda_emulation.shard_statistics(logits, target, whole(v), options)
            assert_statistics(got, logits, target, whole(v), options)


@every_option
@pytest.mark.parametrize("splits", [2, 3, 7, 32])
def test_blocks_that_share_a_row_find_what_one_finds(splits, options):
    logits, target = random_case(3, 50257, torch.bfloat16, offset=5)
    got = cuda_emulation.shard_statistics(logits, target, whole(50257), options, splits=splits)
    assert_statistics(got, logits, target, whole(50257), options)


def test_every_column_is_read_once():
    """With equal logits TAIL counts the columns; with one high logit MAX finds it anywhere."""
    for v in (*range(1, 70), 8192 + 9, 3 * 8192 + 5):
        logits = torch.full((2, v), -3.0, dtype=torch.bfloat16)
        got = cuda_emulation.shard_statistics(
            logits, torch.zeros(2).long(), whole(v), PLAIN, None, 2
        )
        assert got[TAIL].tolist() == [v - 1, v - 1]
    v = 1021
    logits = torch.eye(v, dtype=torch.bfloat16) * 9
    got = cuda_emulation.shard_statistics(logits, torch.arange(v), whole(v), PLAIN)
    assert got[MAX].eq(9).all()
    assert got[TARGET].eq(9).all()


@every_option
@every_dtype
def test_logits_of_minus_infinity_have_no_mass(dtype, options):
    logits, target = random_case(5, 20011, dtype)
    logits[0, :-1] = -torch.inf
    logits[1, :9000] = -torch.inf
    logits[2, 1::2] = -torch.inf
    logits[3] = -torch.inf
    logits[4, int(target[4])] = -torch.inf
    got = cuda_emulation.shard_statistics(logits, target, whole(20011), options, splits=2)
    assert_statistics(got, logits, target, whole(20011), options)
    assert got[:3, 3].tolist() == [-torch.inf, -1, 0]


def coefficients_for(logits, target, shard, options):
    """Coefficients as the loss makes them, with an entropy term and what else is asked for."""
    truth = reference.shard_statistics(logits.double(), target, shard, options)
    z = 1 + truth[TAIL]
    upstream = torch.linspace(0.5, 2, len(target), dtype=torch.float64, device=target.device)
    rows = [truth[MAX], upstream / z, -0.3 * upstream / z, -0.9 * upstream]
    rows += [1e-5 * upstream] * options.distance + [0.4 * upstream / z**2] * options.squares
    return torch.stack(rows).float()


@pytest.mark.parametrize("options", [OPTIONS[n] for n in ("plain", "squares", "softcap")], ids=str)
@every_dtype
@pytest.mark.parametrize("place", ["same alignment", "other alignment", "in place"])
def test_gradient_of_any_vocabulary_and_alignment(dtype, options, place):
    for v in VOCABULARIES[:-1]:
        assert_gradient(v, dtype, options, place)


def assert_gradient(v, dtype, options, place):
    logits, target = random_case(4, v, dtype, offset=3)
    logits[0, 1::5] = -torch.inf
    columns = max(1, v - v // 3)
    shard = Shard(0, columns, -100)
    target = target % columns
    target[1] = columns  # another shard's
    target[2] = -100
    coefficients = coefficients_for(logits, target, shard, options)
    truth = torch.full((4, v), 7.0, dtype=torch.float64)
    reference.shard_gradient(logits.double(), target, shard, options, coefficients.double(), truth)
    start = 4 if place == "other alignment" else 3
    wide = torch.full((4, logits.stride(0)), 7.0, dtype=dtype)
    around = (wide if place != "in place" else logits._base).clone()
    out = logits if place == "in place" else wide[:, start : start + v]
    wide = out._base
    cuda_emulation.shard_gradient(logits, target, shard, options, coefficients, out)
    scale = coefficients[1:3].abs().sum(0).double().unsqueeze(-1) + 1e-5 + options.softcap * 1e-6
    assert_within(out, truth, rtol=2e-6 + ROUNDING[dtype], atol=3e-6 * scale + 2.0**-25)
    assert torch.equal(out[2], torch.zeros(v, dtype=dtype))
    assert torch.equal(out[:, columns:], torch.zeros(4, v - columns, dtype=dtype))
    first = out.storage_offset()
    assert torch.equal(wide[:, :first], around[:, :first])
    assert torch.equal(wide[:, first + v :], around[:, first + v :])


def test_a_bf16_gradient_is_rounded_once_down_to_the_smallest_step():
    logits, target = random_case(6, 4001, torch.bfloat16)
    logits[0, 40] = 80.0  # probabilities below 2^-126, which bf16 still has
    logits[1, 40] = 95.0
    truth = reference.shard_statistics(logits.double(), target, whole(4001), PLAIN)
    coefficients = torch.stack(
        [truth[MAX], 1 / (1 + truth[TAIL]), torch.zeros(6), torch.full((6,), -0.123456789)]
    ).float()
    got = torch.empty_like(logits)
    cuda_emulation.shard_gradient(logits, target, whole(4001), PLAIN, coefficients, got)
    expected = torch.empty(6, 4001, dtype=torch.float64)
    reference.shard_gradient(
        logits.double(), target, whole(4001), PLAIN, coefficients.double(), expected
    )
    assert_within_bf16_ulp(got, expected)
    assert (got == expected.to(torch.bfloat16)).double().mean() >= 0.99
    assert (got[0] != 0).double().mean() > 0.99
    assert got[0].abs().min() < 2.0**-126


@every_option
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_nan_of_any_bits_stays_one(dtype, options):
    assert_a_nan_stays_one(cuda_emulation, dtype, options)


@pytest.fixture
def backend(monkeypatch):
    able = (cuda_emulation.KERNELS, lambda device, dtype: None)
    monkeypatch.setitem(dispatch.BACKENDS, "cuda", able)
    return "cuda"


# What every backend must do, under names that are not taken here.
globals().update(
    {
        f"{name}_as_every_backend": function
        for suite in (test_backends, test_promises, test_property)
        for name, function in vars(suite).items()
        if name.startswith("test_")
    }
)
