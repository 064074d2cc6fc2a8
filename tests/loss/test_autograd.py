"""How the function behaves inside a graph: inputs untouched, memory, in-place, layouts, errors."""

import pytest
import torch

from megatron_infoentropy import vocab_parallel_statistics
from megatron_infoentropy.bench.timing import peak_mib


def random_case(*shape, v=257, dtype=torch.float32):
    generator = torch.Generator().manual_seed(5)
    logits = torch.randn(*shape, v, generator=generator).to(dtype)
    return logits, torch.randint(0, v, shape, generator=generator)


@pytest.mark.parametrize("which", [0, 1, 2], ids=["cross_entropy", "entropy", "logsumexp"])
def test_gradcheck_of_each_result(which):
    logits, target = random_case(4, v=9, dtype=torch.float64)
    logits.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: vocab_parallel_statistics(x, target)[which], logits)


@pytest.mark.parametrize("expanded", [False, True])
@pytest.mark.parametrize("backend", ["reference", "native"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_in_place_backward_gives_the_same_gradient_in_the_logits_memory(backend, dtype, expanded):
    """Expanded rows share memory, which cannot hold a gradient each: they get a copy."""
    leaf, target = random_case(7, dtype=dtype)
    grads, in_place = [], []
    for inplace in (False, True):
        x = leaf[:1].clone().requires_grad_() if expanded else leaf.clone().requires_grad_()
        logits = (x * 1).expand(7, -1)
        logits.register_hook(
            lambda grad, of=logits: in_place.append(grad.data_ptr() == of.data_ptr())
        )
        got = vocab_parallel_statistics(logits, target, backend=backend, inplace_backward=inplace)
        (got.cross_entropy * got.entropy).sum().backward()
        grads.append(x.grad)
    assert torch.equal(*grads)
    assert in_place == [False, not expanded]


def test_in_place_backward_makes_every_later_reader_of_the_logits_raise():
    leaf, target = random_case(7)
    logits = leaf.requires_grad_() * 1
    square = logits.square().sum()
    loss = vocab_parallel_statistics(logits, target, inplace_backward=True).cross_entropy.sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="inplace_backward=False"):
        loss.backward()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        square.backward()


class ViewInside(torch.autograd.Function):
    """A layer that reshapes what it computed: a view whose base requires no gradient."""

    @staticmethod
    def forward(ctx, x):
        return (x * 2).view(2, 3, -1)

    @staticmethod
    def backward(ctx, gradient):
        return gradient.view(6, -1) * 2


@pytest.mark.parametrize(
    ("make", "refused"),
    [
        (lambda x: x.requires_grad_(), True),
        (lambda x: x.requires_grad_().view(2, 3, -1), True),
        (lambda x: x[:4].requires_grad_(), True),
        (lambda x: x[:4].requires_grad_().view(2, 2, -1), True),
        (lambda x: x[:4].requires_grad_().transpose(0, 1)[:, 1:].transpose(0, 1), True),
        (lambda x: x[:4].requires_grad_() * 1, False),
        (lambda x: (x[:4].requires_grad_() * 1).view(2, 2, -1), False),
        (lambda x: ViewInside.apply(x.requires_grad_()), False),
    ],
)
def test_in_place_backward_never_writes_over_a_leaf(make, refused):
    """Nor over a leaf's view, also where the leaf is itself a view of a tensor without gradient."""
    storage, _ = random_case(6)
    before, logits = storage.clone(), make(storage)
    target = torch.zeros(logits.shape[:-1], dtype=torch.long)
    if refused:
        with pytest.raises(ValueError, match=r"would replace your own tensor .* or a view of one"):
            vocab_parallel_statistics(logits, target, inplace_backward=True)
        return
    got = vocab_parallel_statistics(logits, target, inplace_backward=True)
    got.cross_entropy.sum().backward()
    assert torch.equal(storage, before)


def test_transposed_logits_give_the_same_without_a_copy():
    """[s, b, V] as Megatron's output layer makes it, seen as [b, s, V]."""
    logits, target = random_case(6, 4)
    plain = logits.clone().requires_grad_()
    expected = vocab_parallel_statistics(plain, target)
    (expected.cross_entropy * expected.entropy).sum().backward()

    seen = logits.clone().requires_grad_()
    got = vocab_parallel_statistics(seen.transpose(0, 1), target.transpose(0, 1))
    for a, b in zip(got[:4], expected[:4], strict=True):
        assert torch.equal(a.transpose(0, 1), b)
    (got.cross_entropy * got.entropy).sum().backward()
    assert torch.equal(seen.grad, plain.grad)


@pytest.mark.parametrize("transposed", [False, True])
def test_memory_is_the_gradient_and_64_bytes_a_token(transposed):
    n, v = (256, 256), 32
    leaf = torch.randn(*n, v, requires_grad=True)
    target = torch.zeros(n, dtype=torch.long)
    logits, targets = (x.transpose(0, 1) if transposed else x for x in (leaf, target))

    def both_passes():
        got = vocab_parallel_statistics(logits, targets, backend="native")
        ((1 + got.entropy.detach()) * got.cross_entropy).sum().backward()

    peak = peak_mib(both_passes, leaf.device) * 2**20
    assert peak <= leaf.numel() * 4 + leaf[..., 0].numel() * 64 + 4096
    assert peak >= leaf.numel() * 4  # the measurement sees the gradient


def test_a_named_backend_never_falls_back():
    logits, target = random_case(5, dtype=torch.float64)
    with pytest.raises(
        RuntimeError,
        match=r"'native' cannot run here: it takes .*; these can: reference",
    ):
        vocab_parallel_statistics(logits, target, backend="native")
    assert vocab_parallel_statistics(logits, target, backend="auto").entropy.dtype == torch.float64


def test_without_the_extension_the_reference_is_used_and_said_once(monkeypatch, caplog):
    from megatron_infoentropy.kernels import dispatch, native

    monkeypatch.setattr(native, "_C", None)
    monkeypatch.setattr(native, "_BUILD_ERROR", "no compiler", raising=False)
    dispatch._automatic.cache_clear()
    logits, target = random_case(5)
    with caplog.at_level("WARNING"):
        for _ in range(2):
            vocab_parallel_statistics(logits, target)
    dispatch._automatic.cache_clear()
    assert len(caplog.records) == 1
    assert "not built (no compiler)" in caplog.text
    with pytest.raises(RuntimeError, match="these can: reference"):
        vocab_parallel_statistics(logits, target, backend="native")
