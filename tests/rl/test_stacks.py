"""The functions in the stacks' own signatures beside the published ones, both against float64.

On gloo, one and two ranks. Megatron's groups are those of a real `parallel_state`.
"""

import math

import peers
import pytest
import rl_numbers as numbers
import torch
import torch.distributed as dist
from calls import CALLS, our_functions, results, stack_of, their_functions
from close import assert_within, assert_within_bf16_ulp
from launch import run_forked

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def measure(call, functions, kind, dtype):
    rank, world = dist.get_rank(), dist.get_world_size()
    whole = numbers.logits_of(kind, dtype)
    leaf = whole.chunk(world, -1)[rank].contiguous().requires_grad_()
    keep = numbers.with_target(numbers.kept(whole)).chunk(world, -1)[rank]
    logprob, entropy = results(call, functions, leaf * 1, numbers.target_of(), keep)
    by_logprob, by_entropy = numbers.upstream()
    (by_logprob * logprob + by_entropy * entropy).sum().backward()
    return logprob.detach(), entropy.detach(), leaf.grad


def run(world, with_theirs):
    """{(whose, call, kind, dtype): numbers} of everything, on a rank."""
    from megatron.core import parallel_state

    parallel_state.initialize_model_parallel(tensor_model_parallel_size=world)
    try:
        found = {}
        calls = [call for call in CALLS if world == 1 or call != "trl"]
        with torch.compiler.set_stance("force_eager"):  # verl compiles a product, for seconds
            for call in calls:
                whose = {"ours": our_functions()}
                if stack_of(call) in with_theirs:
                    whose["theirs"] = their_functions(stack_of(call))
                for name, functions in whose.items():
                    for kind in numbers.KINDS:
                        for dtype in DTYPES:
                            key = (name, call, kind, dtype)
                            found[key] = measure(call, functions, kind, DTYPES[dtype])
        return found
    finally:
        parallel_state.destroy_model_parallel()


@pytest.fixture(scope="module", params=[1, 2], ids=["tp1", "tp2"])
def measured(request):
    """{(whose, call, kind, dtype): (log-probability, entropy, whole gradient)}."""
    there = [stack for stack, folder in peers.FOLDERS.items() if (folder / stack).exists()]
    ranks = run_forked(run, request.param, request.param, there)
    return {
        key: (*ranks[0][key][:2], torch.cat([rank[key][2] for rank in ranks], -1))
        for key in ranks[0]
    }


def truth(call, kind, dtype):
    logits = numbers.logits_of(kind, DTYPES[dtype])
    keep = numbers.with_target(numbers.kept(logits)) if call == "slime kept" else None
    return numbers.truth_of(logits, keep=keep)


def numbers_of(measured, *key):
    if key not in measured:
        if key[0] == "theirs" and stack_of(key[1]) != "trl":
            peers.require(stack_of(key[1]))
        pytest.skip("TRL's functions know no vocabulary shards")
    return measured[key]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", numbers.KINDS)
@pytest.mark.parametrize("call", CALLS)
def test_ours_equal_float64(measured, call, kind, dtype):
    logprob, entropy, gradient = numbers_of(measured, "ours", call, kind, dtype)
    expected = truth(call, kind, dtype)
    assert logprob.dtype == entropy.dtype == torch.float32
    assert_within(logprob, expected.logprob, rtol=1e-6, atol=1e-6)
    assert_within(entropy, expected.entropy, rtol=1e-6, atol=1e-6)
    if dtype == "fp32":
        assert_within(gradient, expected.gradient, rtol=2e-6, atol=1e-6)
    elif stack_of(call) in ("skyrl", "verl") and call != "verl engine":
        # Two bf16 gradients, which these stacks ask for apart, are added in bf16.
        assert_within(gradient, expected.gradient, atol=2**-7 * expected.gradient.abs().max())
    else:
        assert_within_bf16_ulp(gradient, expected.gradient)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", numbers.KINDS)
@pytest.mark.parametrize("call", CALLS)
def test_ours_are_never_less_exact_than_the_published_ones(measured, call, kind, dtype):
    ours = numbers_of(measured, "ours", call, kind, dtype)
    peers.require(stack_of(call))
    theirs = numbers_of(measured, "theirs", call, kind, dtype)
    expected = truth(call, kind, dtype)
    for own, published, exact in zip(ours, theirs, expected, strict=True):
        bound = torch.finfo(published.dtype).eps * exact.abs().max()
        assert worst(own, exact) <= max(worst(published, exact), float(bound))


def worst(values, exact):
    """The largest error; infinite where a value is not a number and should be."""
    error = (values.double() - exact).abs()
    return float(error.nan_to_num(nan=math.inf).max())
