"""Any shape, dtype, stride, offset, option and cut of the vocabulary: shards equal dense float64.

The shards of one row are folded without processes, as the collective would; every example checks
the statistics' promised bounds and the gradient of every shard for a random upstream gradient.
"""

import os
from typing import NamedTuple

import torch
from close import assert_within
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from oracle import dense_statistics, meant, uniform_cross_entropy

from megatron_infoentropy.kernels import select
from megatron_infoentropy.kernels.contract import Options, Shard
from megatron_infoentropy.loss.collective import merge_shards
from megatron_infoentropy.loss.statistics import Upstream, coefficients, token_results

IGNORED = -100
ROUNDING = {torch.float32: 0.0, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
SMALLEST = {torch.float32: 0.0, torch.bfloat16: 2.0**-133, torch.float16: 2.0**-24}


class Case(NamedTuple):
    tokens: int
    vocabulary: int
    shards: int
    padding: int  # columns of the table beyond the vocabulary
    offset: int  # elements between rows, before each
    dtype: torch.dtype
    scale: float
    shift: float
    masked: bool  # some logits are -inf
    options: Options
    inplace: bool
    seed: int


@st.composite
def cases(draw):
    shards = draw(st.integers(1, 5))
    vocabulary = draw(st.one_of(st.integers(2, 90), st.integers(1000, 2100)))
    masked = draw(st.booleans())
    softcap = draw(st.sampled_from([0.0, 0.0, 3.0, 30.0]))
    temperature = draw(st.sampled_from([1.0, 1.0, 0.7, 2.0]))
    distance = draw(st.booleans()) and not masked
    return Case(
        tokens=draw(st.integers(1, 4)),
        vocabulary=vocabulary,
        shards=shards,
        padding=draw(st.integers(0, 2 * vocabulary // shards)),
        offset=draw(st.integers(0, 9)),
        dtype=draw(st.sampled_from(list(ROUNDING))),
        scale=draw(st.sampled_from([0.0, 0.1, 3.0, 20.0])),
        shift=draw(st.sampled_from([0.0, -90.0, 300.0])),
        masked=masked,
        options=Options(softcap, temperature, distance, draw(st.booleans())),
        inplace=draw(st.booleans()),
        seed=draw(st.integers(0, 2**31)),
    )


def make_logits(case, generator):
    """[N, V] of the dtype, as float64, and targets: the last column, the first, ignored, others."""
    logits = torch.randn(case.tokens, case.vocabulary, generator=generator) * case.scale
    logits = (logits + case.shift).to(case.dtype).double()
    target = torch.randint(0, case.vocabulary, (case.tokens,), generator=generator)
    target[-1] = case.vocabulary - 1
    if case.tokens > 2:
        target[0], target[1] = 0, IGNORED
    if case.masked:
        hidden = torch.rand(logits.shape, generator=generator) < 0.4
        hidden[:, int(torch.randint(case.vocabulary, (1,), generator=generator))] = False
        logits[hidden] = -torch.inf
    return logits, target


def cut(case, logits):
    """Each shard as rows apart in wider memory full of garbage; padding is garbage too."""
    width = -(-(case.vocabulary + case.padding) // case.shards)
    table = torch.full((case.tokens, width * case.shards), 70.0, dtype=torch.float64)
    table[:, : case.vocabulary] = logits
    for rank in range(case.shards):
        memory = torch.full((case.tokens, case.offset + width), torch.nan, dtype=case.dtype)
        view = memory[:, case.offset :]
        view.copy_(table[:, rank * width : (rank + 1) * width])
        columns = min(max(case.vocabulary - rank * width, 0), width)
        yield view, Shard(rank * width, columns, IGNORED)


def truth_of(case, logits, target, upstream):
    leaf = logits.clone().requires_grad_()
    z = meant(leaf, case.options.softcap or None, case.options.temperature)
    results = [*dense_statistics(z, target)]
    if case.options.distance:
        results.append(uniform_cross_entropy(z).masked_fill(target == IGNORED, 0))
    if case.options.squares:
        squares = z.softmax(-1).square().sum(-1)
        results.append(squares.masked_fill(target == IGNORED, 0))
    used = torch.stack(results).masked_fill(torch.stack(results) == torch.inf, 0)
    (used * upstream[: len(results)]).sum().backward()
    return results, leaf.grad


@settings(
    max_examples=12 if os.environ.get("TRITON_INTERPRET") == "1" else 40,  # which is slow
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(case=cases())
@example(Case(4, 2000, 1, 0, 3, torch.bfloat16, 3.0, 0.0, True, Options(), True, 1))
@example(Case(3, 2, 5, 3, 1, torch.float16, 20.0, 0.0, False, Options(30.0, 0.7, True), False, 2))
def test_shards_of_any_kind_equal_dense_float64(backend, case):
    generator = torch.Generator().manual_seed(case.seed)
    logits, target = make_logits(case, generator)
    upstream = torch.randn(5, case.tokens, generator=generator)
    kernels = select(backend, torch.device("cpu"), case.dtype)
    shards = list(cut(case, logits))

    parts = [kernels.shard_statistics(x, target, shard, case.options) for x, shard in shards]
    columns = [shard.columns for _, shard in shards]
    row = merge_shards(torch.stack(parts), columns, case.options)
    got, saved = token_results(row, target, case.vocabulary, IGNORED, case.options)
    expected, gradient = truth_of(case, logits, target, upstream)
    rounding = rounding_of(case, logits)
    atol = 2e-6 + rounding
    assert_within(got.cross_entropy, expected[0], atol=atol, rtol=2.4e-7)
    assert_within(got.entropy, expected[1], atol=1e-5 + 10 * rounding)
    assert_within(got.logsumexp, expected[2], atol=atol, rtol=2.4e-7)
    if case.options.distance:
        assert_within(got.uniform_cross_entropy, expected[3], atol=atol, rtol=1e-6)
    if case.options.squares:
        assert_within(got.sum_p_squared, expected[-1], atol=4e-7 + 20 * rounding)

    g = [upstream[0].masked_fill(got.cross_entropy == torch.inf, 0), upstream[1], upstream[2]]
    more = list(upstream[3:])
    g += [more.pop(0) if case.options.distance else None]
    g += [more.pop(0) if case.options.squares else None]
    coefficients_RN = coefficients(Upstream(*g), saved, case.vocabulary, case.options)
    out = []
    for x, shard in shards:
        to = x if case.inplace else torch.full(x.shape, torch.nan, dtype=case.dtype)
        kernels.shard_gradient(x, target, shard, case.options, coefficients_RN, to)
        out.append(to)
    assert_gradient(case, torch.cat(out, -1).double(), gradient, upstream, logits)


def rounding_of(case, logits):
    """What a cap and a temperature lose of a logit, which is rounded to fp32 after each."""
    softcap, temperature, *_ = case.options
    largest = float(logits[logits.isfinite()].abs().max())
    capped = min(softcap, largest) if softcap else largest
    scaled = capped * 1.2e-7 if temperature != 1 else 0.0
    return (softcap * 2e-7 + scaled) / temperature


def assert_gradient(case, got, gradient, upstream, logits):
    assert torch.equal(got[:, case.vocabulary :], torch.zeros_like(got[:, case.vocabulary :]))
    # The entropy's slope p (ln p + H) is a difference: its error is relative to p |ln p|; and p is
    # as wrong as the logits are rounded.
    softcap, temperature, *_ = case.options
    p = meant(logits, softcap or None, temperature).softmax(-1)
    size = upstream.abs().sum(0).unsqueeze(-1).double() / temperature
    atol = size * (4e-7 * (1 + 20 * p) + 20 * rounding_of(case, logits) * p)
    assert_within(
        got[:, : case.vocabulary],
        gradient,
        atol=atol + SMALLEST[case.dtype],
        rtol=1e-5 + ROUNDING[case.dtype],
    )
