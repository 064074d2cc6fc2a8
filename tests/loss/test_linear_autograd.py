"""The fused linear inside a graph: precision, chunks, main_grad, tied weights."""

import pytest
import torch
from close import assert_within, assert_within_bf16_ulp
from linear_cases import (
    BOTH,
    EVERY,
    fused_loss,
    random_inputs,
    statistics_objective,
    unfused_objective,
)
from oracle import dense_objective, dense_statistics

from megatron_infoentropy import InfoEntropyConfig, infoentropy_loss, vocab_parallel_statistics
from megatron_infoentropy.kernels import ops
from megatron_infoentropy.loss.linear import (
    linear_infoentropy_loss,
    linear_vocab_parallel_statistics,
)

N, H, V = 96, 16, 264


ON_BOTH = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
UNSEEN = {"chunk_tokens": 20, "skip_masked": False}  # shapes and values depend on no data


def make_case(dtype=torch.float32, tokens=N, device="cpu"):
    return random_inputs(tokens, H, V, dtype=dtype, device=device)


def gradients(function, *arguments, dtype=torch.float32, tokens=N, device="cpu", **options):
    hidden, weight, target = make_case(dtype, tokens, device)
    function(hidden, weight, target, *arguments, **options).backward()
    return hidden.grad, weight.grad


def test_exact_logits_give_the_same_bits_in_chunks_of_any_size():
    """With small integers every logit is exact, whatever order a matrix product adds in."""
    generator = torch.Generator().manual_seed(2)
    hidden = torch.randint(-3, 4, (N, H), generator=generator).float()
    weight = torch.randint(-2, 3, (V, H), generator=generator).float()
    target = torch.randint(0, V, (N,), generator=generator)
    unfused = vocab_parallel_statistics(hidden @ weight.T, target)
    loss = infoentropy_loss(hidden @ weight.T, target)
    for chunk in (1, 7, 32, 4096):
        got = linear_vocab_parallel_statistics(hidden, weight, target, chunk_tokens=chunk)
        for part, expected in zip(got[:4], unfused[:4], strict=True):
            assert torch.equal(part, expected)
        fused = fused_loss(hidden, weight, target, chunk_tokens=chunk)
        assert torch.equal(fused, loss)


@pytest.mark.parametrize("backend", ["reference", "native"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_fused_equals_unfused(dtype, backend):
    config = InfoEntropyConfig(backend=backend, chunk_tokens=40)
    hidden, weight, target = make_case(dtype)
    expected = infoentropy_loss(hidden @ weight.T, target, config)
    expected.backward()
    h, w, _ = make_case(dtype)
    loss = linear_infoentropy_loss(h, w, target, config)
    loss.backward()
    assert loss.dtype == torch.float32
    assert_within(loss, expected, rtol=1e-6)
    step = 1e-6 if dtype == torch.float32 else 2**-7
    for fused, unfused in ((h.grad, hidden.grad), (w.grad, weight.grad)):
        assert fused.dtype == dtype
        assert_within(fused, unfused, atol=step * unfused.abs().max().item())


@BOTH
def test_the_weight_gradient_of_16_bit_inputs_is_added_up_in_fp32(function):
    """Over 64 chunks: as good as a bf16 number can be, and far better than sums kept in bf16."""
    tokens, chunk = 1024, 16
    _, fused = gradients(function, dtype=torch.bfloat16, tokens=tokens, chunk_tokens=chunk)
    hidden, weight, target = make_case(torch.bfloat16, tokens)
    in_bf16 = torch.zeros_like(weight)
    logits = (hidden @ weight.T).detach().requires_grad_()  # rounded as ours are
    if function is fused_loss:
        infoentropy_loss(logits, target).backward()
    else:
        unfused_objective(logits, torch.eye(V, dtype=torch.bfloat16), target).backward()
    for start in range(0, tokens, chunk):
        rows = slice(start, start + chunk)
        in_bf16 += logits.grad[rows].T @ hidden[rows].detach()
    truth = logits.grad.double().T @ hidden.detach().double()
    scale = truth.abs().max()
    ours, theirs = ((got.double() - truth).abs().max() / scale for got in (fused, in_bf16))
    assert ours < 2**-7
    assert ours < theirs / 3, f"{ours:.2e} against {theirs:.2e}"


@ON_BOTH
def test_the_factor_of_a_loss_is_not_rounded_to_16_bits(device):
    """1 + 2^-9 vanishes in bf16, also as what a GPU makes of a factor without dimensions."""
    factor = 1 + 2**-9
    hidden, weight, target = make_case(torch.bfloat16, device=device)
    loss = fused_loss(hidden, weight, target, chunk_tokens=20)
    (loss * factor).backward()
    plain = gradients(fused_loss, dtype=torch.bfloat16, device=device, chunk_tokens=20)
    for scaled, once in zip((hidden.grad, weight.grad), plain, strict=True):
        assert not torch.equal(scaled, once)
        assert_within_bf16_ulp(scaled.cpu(), once.cpu().double() * factor, ulps=1.01)


@BOTH
def test_no_number_is_looked_at(function):
    """Tensors on "meta" have none: a look, or a shape that depends on one, would raise."""
    hidden, weight, target = make_case(torch.bfloat16, device="meta")
    function(hidden, weight, target, backend="reference", **UNSEEN).backward()
    assert (hidden.grad.shape, weight.grad.dtype) == (hidden.shape, torch.bfloat16)


@pytest.mark.gpu
@BOTH
def test_a_gpu_gives_what_a_cpu_gives_without_a_look_at_numbers(function):
    expected = gradients(function, dtype=torch.float64, backend="reference", **UNSEEN)
    case = make_case(torch.bfloat16, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        function(*case, **UNSEEN).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for leaf, truth in zip(case[:2], expected, strict=True):
        assert_within(leaf.grad, truth, atol=2e-2 * truth.abs().max().item())


@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("main_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_main_grad_takes_the_weight_gradient(function, dtype, main_dtype):
    _, expected = gradients(function, dtype=dtype)
    hidden, weight, target = make_case(dtype)
    start = torch.randn(V, H).to(main_dtype)
    weight.main_grad, weight.grad_added_to_main_grad = start.clone(), False
    function(hidden, weight, target, into_main_grad=True, chunk_tokens=20).backward()
    assert_within(
        weight.main_grad,
        start.double() + expected.double(),
        atol=(2**-7 if dtype == torch.bfloat16 else 2e-6) * expected.abs().max().item(),
        rtol=2**-8 if main_dtype == torch.bfloat16 else 2e-7,
    )
    assert weight.grad_added_to_main_grad is True
    assert weight.grad.shape == weight.shape  # without meaning: it makes hooks run
    assert weight.main_grad.dtype == main_dtype


@BOTH
@ON_BOTH
def test_main_grad_of_16_bit_weights_is_not_rounded_to_16_bits(function, device):
    """On a GPU cuBLAS multiplies bf16 and adds in fp32."""
    hidden, weight, target = make_case(torch.bfloat16, device=device)
    weight.main_grad = torch.zeros_like(weight, dtype=torch.float32, requires_grad=False)
    function(hidden, weight, target, into_main_grad=True, chunk_tokens=20).backward()
    assert weight.grad is None  # as Megatron without `grad_added_to_main_grad`
    assert (weight.main_grad != weight.main_grad.bfloat16().float()).any()


@BOTH
def test_main_grad_is_left_alone_unless_asked_for(function):
    hidden, weight, target = make_case()
    weight.main_grad, weight.grad_added_to_main_grad = torch.zeros(V, H), False
    function(hidden, weight, target).backward()
    assert torch.equal(weight.main_grad, torch.zeros(V, H))
    assert torch.equal(weight.grad, gradients(function)[1])
    assert weight.grad_added_to_main_grad is False


@BOTH
@pytest.mark.parametrize("into_main_grad", [False, True])
def test_a_tied_weight_gets_the_gradient_of_both_its_uses(function, into_main_grad):
    tokens = torch.arange(N) % 50
    dense = make_case(torch.float64)[1].detach().requires_grad_()
    target = make_case()[2]
    logits = dense[tokens] @ dense.T
    if function is fused_loss:
        dense_objective([(logits, target, torch.ones(N))]).backward()
    else:
        ce, entropy, _ = dense_statistics(logits, target)
        ((1 + entropy.detach()) * ce).sum().backward()
    _, weight, _ = make_case()
    if into_main_grad:
        weight.main_grad, weight.grad_added_to_main_grad = torch.zeros(V, H), False
        weight.zero_out_wgrad = True
    function(weight[tokens], weight, target, into_main_grad=into_main_grad).backward()
    total = weight.grad + (weight.main_grad if into_main_grad else 0)  # as DDP's hook adds them
    assert_within(total, dense.grad, atol=2e-6 * dense.grad.abs().max().item())


@BOTH
@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_a_frozen_input_gets_no_gradient_and_changes_nothing(function, frozen):
    expected = dict(zip(("hidden", "weight"), gradients(function), strict=True))
    hidden, weight, target = make_case()
    leaves = {"hidden": hidden, "weight": weight}
    leaves[frozen].requires_grad_(False)
    function(hidden, weight, target).backward()
    assert leaves.pop(frozen).grad is None
    ((name, leaf),) = leaves.items()
    assert torch.equal(leaf.grad, expected[name])


@BOTH
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_without_gradients_the_value_is_the_same_and_none_is_formed(function, mode, monkeypatch):
    hidden, weight, target = make_case()
    expected = function(hidden, weight, target)
    for backward in ("grad", "backward"):
        monkeypatch.setattr(torch.autograd, backward, None)
    monkeypatch.setattr(ops.ShardKernels, "gradient", None)
    with mode():
        if mode is torch.enable_grad:  # of inputs that need none
            hidden, weight = hidden.detach(), weight.detach()
        assert torch.equal(function(hidden, weight, target), expected)
        # Tensors that were made there, as a model's are.
        assert torch.equal(function(hidden * 1, weight * 1, target + 0), expected)


@EVERY
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_inputs_stay_as_they_are(function, dtype):
    hidden, weight, target = make_case(dtype)
    before = [x.detach().clone() for x in (hidden, weight, target)]
    function(hidden, weight, target).backward()
    for x, was in zip((hidden, weight, target), before, strict=True):
        assert torch.equal(x.detach(), was)


@EVERY
def test_runs_are_equal_to_the_bit(function):
    for one, again in zip(gradients(function), gradients(function), strict=True):
        assert torch.equal(one, again)


def test_transposed_hidden_states_and_any_integer_targets_are_taken():
    hidden, weight, target = make_case()
    expected = statistics_objective(hidden, weight, target)
    seen = hidden.view(12, 8, H).transpose(0, 1)
    got = statistics_objective(seen, weight, target.int().view(12, 8).T)
    assert_within(got, expected, rtol=1e-6)


@EVERY
def test_a_second_derivative_is_refused(function):
    hidden, weight, target = make_case()
    loss = function(hidden, weight, target)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(loss, hidden, create_graph=True)


@pytest.mark.parametrize("function", [unfused_objective, statistics_objective])
def test_statistics_allow_a_second_backward(function):
    hidden, weight, target = make_case()
    loss = function(hidden, weight, target)
    loss.backward(retain_graph=True)
    once = hidden.grad.clone(), weight.grad.clone()
    loss.backward()
    assert torch.equal(hidden.grad, 2 * once[0])
    assert torch.equal(weight.grad, 2 * once[1])


def test_the_loss_refuses_a_second_backward():
    hidden, weight, target = make_case()
    loss = linear_infoentropy_loss(hidden, weight, target)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="use linear_vocab_parallel_statistics"):
        loss.backward()


@pytest.mark.parametrize("changed", ["hidden", "weight"])
def test_an_input_that_changed_before_backward_raises(changed):
    """The logits are made from it once more: they would be others."""
    hidden, weight, target = make_case()
    inputs = {"hidden": hidden * 1, "weight": weight * 1}
    loss = statistics_objective(inputs["hidden"], inputs["weight"], target)
    inputs[changed].data.add_(0)  # hidden from autograd, as an optimizer's step is
    loss.backward(retain_graph=True)
    inputs[changed].detach().add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
