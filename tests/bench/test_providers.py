"""Every provider computes the right number, called as its users call it."""

import sys
from dataclasses import replace
from types import ModuleType, SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from close import assert_within
from oracle import dense_statistics

from megatron_infoentropy.bench.cases import Case
from megatron_infoentropy.bench.providers import (
    FOR_GPUS,
    LABEL_SMOOTHING,
    SOFTCAP,
    Unavailable,
    ours,
    peers,
)


def inputs(dtype=torch.float32):
    generator = torch.Generator().manual_seed(3)
    logits = (torch.randn(12, 70, generator=generator) * 3).to(dtype)
    return logits, torch.randint(70, (12,), generator=generator)


def true_loss(logits, target, computes):
    z = SOFTCAP * (logits / SOFTCAP).tanh() if computes == "softcap" else logits
    ce, entropy, lse = dense_statistics(z, target)
    if computes == "cross entropy":
        return ce.mean()
    if computes == "label smoothing":
        ce = (1 - LABEL_SMOOTHING) * ce + LABEL_SMOOTHING * (lse - z.mean(-1))
    weight = 1 + entropy.detach()
    return (weight * ce).sum() / weight.sum()


def assert_right(provider, setting, rtol):
    logits, target = inputs(setting.dtype)
    truth = logits.double().requires_grad_()
    true_loss(truth, target, provider.computes).backward()
    leaf = logits.clone().requires_grad_()
    loss = provider.make(setting)(leaf, target)
    loss.backward()
    expected = true_loss(logits.double(), target, provider.computes)
    assert_within(loss, expected, rtol=rtol)
    assert_within(leaf.grad, truth.grad, atol=rtol * float(truth.grad.abs().max()))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_all_of_ours_are_right(setting, dtype):
    setting = replace(setting, case=replace(setting.case, dtype=dtype))
    running = [p for p in ours(setting) if not p.name.startswith(("triton", "cuda"))]
    assert len(running) == 7  # two backends, each twice; plain; two options
    for provider in running:
        assert_right(provider, setting, 1e-6 if dtype == "float32" else 2**-7)


def test_interpreted_kernels_are_not_timed(setting, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    triton = next(p for p in ours(setting) if p.name == "triton")
    with pytest.raises(Unavailable, match="interpreted"):
        triton.make(setting)


@pytest.mark.parametrize("name", [p.name for p in peers() if p.name not in FOR_GPUS])
def test_peers_that_need_no_gpu_are_right(setting, name):
    setting = replace(setting, compiled=True)
    (provider,) = [p for p in peers() if p.name == name]
    # Compiling takes seconds; what is compiled is the same function.
    with torch.compiler.set_stance("force_eager"):
        # "megatron fused" rounds every gradient to bf16; the paper clamps probabilities.
        rtol = 2**-8 if name == "megatron fused" else 1e-6
        assert_right(provider, setting, rtol)


def refusals(setting):
    """{name: reason} of the peers that cannot take part."""
    refused = {}
    for provider in peers():
        try:
            provider.make(setting)
        except Unavailable as error:
            refused[provider.name] = str(error)
    return refused


def test_peers_that_cannot_take_part_say_why(setting):
    compiled = ("torch compiled", "megatron fused", "paper compiled")
    left_out = "compiled providers were left out (--no-compiled)"
    need_a_gpu = dict.fromkeys(FOR_GPUS, "its kernels need a GPU")
    assert refusals(setting) == need_a_gpu | dict.fromkeys(compiled, left_out)
    refused = refusals(replace(setting, case=Case(12, 70, tensor_parallel=2)))
    assert {name for name, why in refused.items() if why == "it has no tensor parallelism"} == {
        *("torch", "torch compiled", "liger", "quack", "trl", "paper eager", "paper compiled")
    }


def test_uninstalled_and_broken_packages_are_told_apart(setting, monkeypatch):
    on_gpu = replace(setting, device=torch.device("cuda"))
    liger = next(p for p in peers() if p.name == "liger")
    with pytest.raises(Unavailable, match="it is not installed"):
        liger.make(on_gpu)
    monkeypatch.setitem(sys.modules, "liger_kernel", ModuleType("liger_kernel"))
    with pytest.raises(Unavailable, match="it cannot be imported"):
        liger.make(on_gpu)


def per_token(logits, target):
    losses = F.cross_entropy(logits.flatten(0, -2), target.flatten(), reduction="none")
    return losses.view(target.shape)


def test_gpu_peers_are_called_as_their_users_do(setting, monkeypatch):
    """Stand-ins with the signatures of the real ones; these compute, so a wrong call shows."""

    def transformer_engine(
        inp, target, reduce_loss=False, dist_process_group=None, *, overwrite_input=False
    ):
        assert inp.dim() == 3
        assert dist_process_group is setting.group
        return per_token(inp, target)

    def flash(logits, labels, *, inplace_backward, process_group):
        assert process_group is None
        return per_token(logits, labels), None

    def quack(x, target, *, reduction, inplace_backward):
        return per_token(x, target)

    def trl(logits, index, temperature=1.0, row_mask=None):
        log_p = logits.log_softmax(-1)
        entropy = -(log_p.exp() * log_p).sum(-1)
        return log_p.gather(-1, index.unsqueeze(-1)).squeeze(-1), entropy

    class VocabParallel:
        def __call__(self, logits, target, group):
            assert logits.dim() == 3
            assert group is setting.group
            return per_token(logits, target)

    stand_ins = {
        "transformer engine": transformer_engine,
        "transformer engine in place": transformer_engine,
        "liger": torch.nn.CrossEntropyLoss,
        "liger vocab-parallel": VocabParallel,
        "flash-attn": flash,
        "quack": quack,
        "trl": trl,
    }
    for name, (path, _) in FOR_GPUS.items():
        module, _, attribute = path.rpartition(".")
        monkeypatch.setitem(sys.modules, module, SimpleNamespace(**{attribute: stand_ins[name]}))
    on_gpu = replace(setting, device=torch.device("cuda"))
    for provider in peers():
        if provider.name in FOR_GPUS:
            assert_right(provider, on_gpu, 1e-6)
