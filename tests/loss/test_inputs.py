"""What the public functions take: plain tensors, shards of a DTensor, targets of any integer type.

Kernels are handed addresses. Whatever has none, or another one than it says, would end the process.
"""

import warnings

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from torch.distributed.tensor import DTensor, Replicate, Shard, init_device_mesh

from megatron_infoentropy import (
    InfoEntropyConfig,
    infoentropy_loss,
    kernels,
    linear_infoentropy_loss,
    linear_vocab_parallel_statistics,
    vocab_parallel_statistics,
)
from megatron_infoentropy.kernels import contract, ops

N, H, V = 6, 8, 64
INTEGERS = [torch.uint8, torch.uint16, torch.uint32, torch.uint64, torch.int8, torch.int16]
# function, what of it holds a shard of the vocabulary, along which dimension
SHARDED = [(infoentropy_loss, "logits", 1), (linear_infoentropy_loss, "weight", 0)]


class Wrapper(torch.Tensor):
    """Another tensor's shape and dtype, with no memory of its own."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        raise NotImplementedError(f"{function}")


class Named(torch.Tensor):
    """A subclass that is its own memory."""


def freed(x):
    x.untyped_storage().resize_(0)
    return x


def to_turn(x):
    """-x, the sign not yet turned in memory."""
    return torch.complex(torch.zeros_like(x), x).conj().imag


ODD = {
    "a Wrapper, which kernels cannot read": Wrapper,
    "without memory": lambda x: torch._efficientzerotensor(x.shape, dtype=x.dtype),
    "without memory.*functionalization": torch._to_functional_tensor,
    "without memory.*freed": freed,
    r"layout torch.sparse_coo: make it dense": torch.Tensor.to_sparse,
    r"call \.resolve_neg\(\)": to_turn,
}
FUNCTIONS = [
    vocab_parallel_statistics,
    infoentropy_loss,
    linear_vocab_parallel_statistics,
    linear_infoentropy_loss,
]


def arguments_of(function):
    generator = torch.Generator().manual_seed(3)
    given = {"target": torch.randint(0, V, (N,), generator=generator)}
    if function in FUNCTIONS[:2]:
        given["logits"] = torch.randn(N, V, generator=generator)
    else:
        given["hidden"] = torch.randn(N, H, generator=generator)
        given["weight"] = torch.randn(V, H, generator=generator)
    if function in FUNCTIONS[1::2]:
        given["loss_mask"] = torch.ones(N)
    return given


OF_LOGITS, FUSED, STATISTICS, LOSSES = FUNCTIONS[:2], FUNCTIONS[2:], FUNCTIONS[::2], FUNCTIONS[1::2]
REFUSED = [
    (FUNCTIONS, {"target": torch.zeros(N)}, "integer targets"),
    (FUNCTIONS, {"target": torch.full((N,), V)}, f"vocabulary of {V} entries, the first is {V}"),
    (FUNCTIONS, {"target": torch.full((N,), -1)}, "is -1; to leave tokens out use ignore_index"),
    (FUNCTIONS, {"target": torch.zeros(N, device="meta").long()}, "on one device, got .* on meta"),
    (FUNCTIONS, {"vocab_size": V + 1}, f"1 shard.s. of {V} columns .* is every rank of the group"),
    (FUNCTIONS, {"vocab_size": 0}, "does not fit"),
    (STATISTICS[:1], {"target": torch.zeros(N - 1).long()}, "transpose one of them"),
    (OF_LOGITS, {"logits": torch.zeros(N, 0)}, "at least one column"),
    (OF_LOGITS, {"logits": torch.zeros(N, V).long()}, "floating-point logits"),
    (FUSED, {"hidden": torch.zeros(N, H + 1)}, r"hidden \[..., H\] and weight \[V, H\]"),
    (FUSED, {"weight": torch.zeros(V, H).double()}, "under autocast.* weight.to.hidden.dtype"),
    (STATISTICS[1:], {"target": torch.zeros(N - 1).long()}, "expected a target of"),
    (STATISTICS[1:], {"chunk_tokens": 0}, "chunk_tokens must be at least 1"),
    (LOSSES, {"loss_mask": torch.ones(3, 1)}, r"loss_mask must have the target's shape \[6\]"),
    (
        LOSSES[:1],
        {"token_input": torch.ones(3)},
        r"token_input in the target's shape \[6\], .* \[3\]",
    ),
    (STATISTICS, {"collective": "ring"}, "must be 'gather' or 'all_reduce', got 'ring'"),
    (STATISTICS, {"backend": "numpy"}, "must be 'auto' or one of .*'native', .*'reference'"),
    (STATISTICS, {"temperature": torch.ones(3)}, r"in the target's shape \[6\], got \[3\]"),
    *(
        (STATISTICS, {"temperature": torch.full((N,), value)}, f"must be positive, got {value}")
        for value in (0.0, torch.nan, -1.0)
    ),
    *(
        (STATISTICS, {name: value}, f"{name} must be positive and finite")
        for name in ("softcap", "temperature")
        for value in (0.0, -1.0, 1e-40, 1e39, torch.inf, torch.nan)
    ),
]


@pytest.mark.parametrize(
    ("function", "change", "message"),
    [(function, *refused) for functions, *refused in REFUSED for function in functions],
)
def test_what_does_not_fit_is_refused_in_words(function, change, message):
    with pytest.raises(ValueError, match=message):
        function(**arguments_of(function) | change)


@pytest.mark.parametrize("message", ODD)
@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: function.__name__)
def test_a_tensor_that_is_not_plain_is_refused_by_name(function, message):
    for name in arguments_of(function):
        given = arguments_of(function)
        if ODD[message] is to_turn and name == "target":
            continue  # only complex numbers have a sign to be turned
        given[name] = ODD[message](given[name])
        with pytest.raises(ValueError, match=f"expected a plain tensor as {name}, got .*{message}"):
            function(**given)


def test_a_transform_of_torch_func_is_refused():
    given = arguments_of(infoentropy_loss)
    logits, target = given["logits"], given["target"]
    with pytest.raises(ValueError, match=r"torch\.func and functionalization are not supported"):
        torch.func.grad(lambda x: infoentropy_loss(x, target))(logits)


def test_a_gradient_that_is_not_plain_never_reaches_a_kernel():
    logits, target, zeros = torch.randn(N, V), torch.zeros(N).long(), (4, N)
    chosen = kernels.select("native", logits.device, logits.dtype)
    bound = ops.ShardKernels(chosen, contract.Shard(0, V, -100), contract.PLAIN)
    with pytest.raises(ValueError, match="a plain tensor as coefficients"):
        bound.gradient(logits, target, torch._efficientzerotensor(zeros), inplace=False)


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: function.__name__)
def test_a_subclass_with_memory_of_its_own_is_taken(function):
    plain = arguments_of(function)
    named = {name: x.as_subclass(Named) for name, x in plain.items()}
    first, second = function(**plain), function(**named)
    if isinstance(first, tuple):
        first, second = first.cross_entropy, second.cross_entropy
    assert torch.equal(first, second)


def distributed(x, placement, **options):
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    return DTensor.from_local(x, mesh, [placement], **options).requires_grad_()


def sharded_on_rank():
    """[(value, gradient by this rank's shard)] of a DTensor, then of its plain shard."""
    world, rank = dist.group.WORLD, dist.get_rank()
    results = []
    for function, name, dim in SHARDED:
        given = arguments_of(function)
        shard = given[name].chunk(2, dim)[rank].contiguous()
        for leaf in (distributed(shard, Shard(dim)), shard.clone().requires_grad_()):
            loss = function(**{**given, name: leaf}, group=world)
            loss.backward()
            gradient = leaf.grad
            results.append((loss.detach(), getattr(gradient, "_local_tensor", gradient)))
    return results


def test_a_dtensor_sharded_along_the_vocabulary_is_taken():
    for results in run_ranks(sharded_on_rank, 2):
        for (loss, gradient), (plain, its_gradient) in zip(
            results[::2], results[1::2], strict=True
        ):
            assert torch.equal(loss, plain)
            assert torch.equal(gradient, its_gradient)


def refused_on_rank():
    world, given = dist.group.WORLD, arguments_of(infoentropy_loss)
    logits, target = given["logits"], given["target"]
    alone = [dist.new_group([0]), dist.new_group([1])][dist.get_rank()]
    uneven = distributed(logits[:, : 33 - dist.get_rank()], Shard(1), shape=(N, 65), stride=(65, 1))
    cases = [
        (distributed(logits, Replicate()), target, world),
        (distributed(logits[:3], Shard(0)), target, world),
        (distributed(logits, Shard(1)), target, None),
        (distributed(logits, Shard(1)), target, alone),
        (uneven, target, world),
        (logits, distributed(target.double(), Replicate()), world),
    ]
    messages = []
    for logits, target, group in cases:
        try:
            messages.append(str(infoentropy_loss(logits, target, group=group)))
        except ValueError as error:
            messages.append(str(error))
    leaf = distributed(given["logits"].clone(), Shard(1))
    try:
        infoentropy_loss(leaf, given["target"], group=world, inplace_backward=True)
    except ValueError as error:
        messages.append(str(error))
    return messages


def test_any_other_dtensor_is_refused_with_what_to_call():
    for *messages, inplace in run_ranks(refused_on_rank, 2):
        for message in messages:
            assert "got a DTensor placed [" in message
            assert "pass its .to_local(), and the group" in message
        assert "replace your own tensor" in inplace


@pytest.mark.parametrize("fused", [False, True], ids=["logits", "fused"])
@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
def test_targets_are_widened_before_tokens_are_left_out(dtype, fused):
    """In uint8 the usual ignore_index is 156, a token like any other."""
    generator = torch.Generator().manual_seed(4)
    size = 100 if dtype == torch.int8 else 200
    logits = torch.randn(N, size, generator=generator)
    target = torch.tensor([3, 99, 0, 42, 17, 98 if dtype == torch.int8 else 156])
    mask = torch.tensor([1.0, 0, 1, 0.5, 1, 1])

    def loss(target):
        if fused:
            return linear_infoentropy_loss(logits, torch.eye(size), target, loss_mask=mask)
        return infoentropy_loss(logits, target, loss_mask=mask)

    assert torch.equal(loss(target.to(dtype)), loss(target))


def gathered_on_rank(collective, debug):
    """What is said where every rank is given logits, or a weight, of the whole vocabulary."""
    config = InfoEntropyConfig(collective=collective)
    said = []
    if debug:
        dist.set_debug_level(dist.DebugLevel.DETAIL)
    try:
        for function, name, dim in SHARDED:
            whole = arguments_of(function)
            shard = {**whole, name: whole[name].chunk(2, dim)[dist.get_rank()].contiguous()}
            unread = {**shard, "target": torch.full_like(shard["target"], -100)}
            options = {"config": config, "group": dist.group.WORLD}
            for given in (whole, shard, unread):
                with warnings.catch_warnings(record=True) as caught:
                    warnings.simplefilter("always")
                    function(**given, **options, vocab_size=None if debug else V)
                said.append([str(warning.message) for warning in caught])
    finally:
        dist.set_debug_level(dist.DebugLevel.OFF)
    return said


@pytest.mark.parametrize("debug", [False, True], ids=["vocab_size", "debug"])
@pytest.mark.parametrize("collective", ["gather", "all_reduce"])
def test_a_vocabulary_that_was_gathered_is_noticed(collective, debug):
    why = "all ranks hold equal logits" if debug else "each of 2 ranks holds 64 columns"
    for said in run_ranks(gathered_on_rank, 2, collective, debug):
        for (message,), shard, unread in (said[:3], said[3:]):  # of logits, of a weight
            assert why in message
            assert "too high by ln(2) = 0.693; pass this rank's own shard, or group=None" in message
            assert shard == unread == []
