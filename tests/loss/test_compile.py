"""torch.compile sees through the loss, and the kernels are well-behaved operators of PyTorch."""

import os

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks

from megatron_infoentropy import (
    InfoEntropyConfig,
    infoentropy_loss,
    linear_infoentropy_loss,
    vocab_parallel_statistics,
)
from megatron_infoentropy.kernels import ops


@pytest.fixture(autouse=True)
def compiler_is_on():
    """Another test may have left its switch behind, and nearly everything here would pass."""
    assert os.environ.get("TORCHDYNAMO_DISABLE", "0") == "0"
    assert not torch._dynamo.config.disable


def random_case(n=33, v=257, dtype=torch.float32):
    generator = torch.Generator().manual_seed(n)
    logits = (torch.randn(n, v, generator=generator) * 3).to(dtype)
    target = torch.randint(0, v, (n,), generator=generator)
    target[3] = -100
    return logits, target


def compare_compiled(logits, target, config, engine, group=None, dynamic=None):
    """(loss, gradient) of the plain and of the compiled function; without an engine plain twice."""

    def function(leaf):
        # Logits that a model computed, whose gradient may be written over them.
        return infoentropy_loss(leaf * 1.5, target, config, group=group, inplace_backward=True)

    pairs, compiled = [], function
    if engine:
        torch._dynamo.reset()
        compiled = torch.compile(function, fullgraph=True, backend=engine, dynamic=dynamic)
    for run in (function, compiled):
        leaf = logits.clone().requires_grad_()
        loss = run(leaf)
        loss.backward()
        pairs.append((loss.detach(), leaf.grad))
    return pairs


@pytest.mark.parametrize(
    ("settings", "dtype", "backend"),
    [
        (None, torch.float32, None),
        ({}, torch.bfloat16, "native"),
        ({}, torch.float32, "reference"),
        ({"detach_weight": False, "gamma": 2.0}, torch.float32, "native"),
        ({"label_smoothing": 0.1, "softcap": 5.0}, torch.float32, "native"),
        *(
            (
                {"objective": "custom", "weighting": f"test_weighting:{name}"},
                torch.float32,
                "native",
            )
            for name in ("surprise", "of_two")
        ),
    ],
    ids=["no configuration", "bf16", "reference", "attached", "smoothed", "custom", "of two"],
)
def test_a_full_graph_gives_the_same(settings, dtype, backend):
    logits, target = random_case(dtype=dtype)
    config = None if settings is None else InfoEntropyConfig(backend=backend, **settings)
    (loss, gradient), (compiled, its_gradient) = compare_compiled(
        logits, target, config, "aot_eager"
    )
    torch.testing.assert_close(compiled, loss, rtol=2e-7, atol=0)
    torch.testing.assert_close(
        its_gradient, gradient, rtol=8e-3 if dtype.itemsize == 2 else 1e-6, atol=1e-9
    )


def test_a_negative_weight_poisons_the_loss_where_a_look_at_it_is_not_free():
    logits, target = random_case()
    config = InfoEntropyConfig(objective="custom", weighting="test_weighting:surprise_alone")
    compiled = torch.compile(infoentropy_loss, fullgraph=True, backend="eager")
    assert compiled(logits, target, config).isnan()


def test_the_default_compiler_gives_the_same_for_any_number_of_tokens():
    """Inductor fuses what stands on [tokens]; the number of tokens is not burnt in."""
    torch._dynamo.reset()
    config = InfoEntropyConfig(detach_weight=False, label_smoothing=0.1)
    compiled = torch.compile(
        lambda x, y: infoentropy_loss(x * 1.5, y, config), fullgraph=True, dynamic=True
    )
    for n in (33, 50, 7):
        logits, target = random_case(n)
        ours, theirs = logits.clone().requires_grad_(), logits.clone().requires_grad_()
        loss = infoentropy_loss(ours * 1.5, target, config)
        loss.backward()
        other = compiled(theirs, target)
        other.backward()
        torch.testing.assert_close(other, loss, rtol=1e-6, atol=0)
        torch.testing.assert_close(theirs.grad, ours.grad, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("settings", [None, {"gamma": 0.0}], ids=["published", "cross entropy"])
def test_the_fused_linear_says_why_it_cannot_be_captured_whole(settings):
    """Without fullgraph=True it runs, between two graphs."""
    torch._dynamo.reset()
    config = None if settings is None else InfoEntropyConfig(**settings)
    weight, target = random_case()
    hidden, expected = torch.eye(33), infoentropy_loss(weight, target, config)
    given = (hidden, weight.T.contiguous(), target, config)
    whole = torch.compile(linear_infoentropy_loss, fullgraph=True, backend="aot_eager")
    with pytest.raises(torch._dynamo.exc.Unsupported, match="compile without fullgraph=True, or"):
        whole(*given)
    parts = torch.compile(linear_infoentropy_loss, backend="aot_eager")
    torch.testing.assert_close(parts(*given), expected)


def compiled_on_rank(collective):
    """Compiled on rank 1, whose shard does not begin at 0; the other does as without a compiler."""
    logits, target = random_case(v=256)
    shard = logits.chunk(dist.get_world_size(), -1)[dist.get_rank()]
    config = InfoEntropyConfig(collective=collective, label_smoothing=0.1)
    engine = "aot_eager" if dist.get_rank() else None
    return compare_compiled(shard, target, config, engine, dist.group.WORLD, dynamic=True)


@pytest.mark.parametrize("collective", ["gather", "all_reduce"])
def test_the_collective_is_part_of_the_graph(collective):
    results = run_ranks(compiled_on_rank, 2, collective)
    for (loss, gradient), (compiled, its_gradient) in results:
        torch.testing.assert_close(compiled, loss, rtol=2e-7, atol=0)
        torch.testing.assert_close(its_gradient, gradient, rtol=1e-6, atol=1e-9)


def test_statistics_of_their_own_compile_too():
    torch._dynamo.reset()
    logits, target = random_case()
    compiled = torch.compile(vocab_parallel_statistics, fullgraph=True, backend="aot_eager")
    got, expected = compiled(logits, target), vocab_parallel_statistics(logits, target)
    for part, truth in zip(got[:4], expected[:4], strict=True):
        torch.testing.assert_close(part, truth)


@pytest.mark.parametrize(
    ("dtype", "backend", "distance"),
    [(torch.float32, "reference", False), (torch.bfloat16, "native", True)],
    ids=["fp32", "bf16"],
)
def test_the_operators_pass_pytorchs_own_check(dtype, backend, distance):
    logits, target = random_case(dtype=dtype)
    inverse = torch.linspace(0.5, 2, len(target)) if distance else None
    options = (0, 250, -100, 4.0, 0.8, distance, distance, inverse, backend)
    torch.library.opcheck(ops.statistics_operator, (logits, target, *options))
    coefficients = torch.rand(6 if distance else 4, len(target))
    torch.library.opcheck(ops.gradient_operator, (logits, target, coefficients, *options))
