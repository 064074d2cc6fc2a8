"""With --infoentropy-fused-linear a training run is the one without it; what it cannot go with."""

import json
from types import SimpleNamespace

import probe_fused_linear
import probe_losses
import pytest
import torch
import torch.distributed as dist
from close import assert_within
from launch import TINY_MODEL, run_forked, run_trainer
from test_gradient_oracle import (
    GAMMAS,
    LAYOUTS,
    MICRO_BATCH,
    PLAIN,
    VOCAB,
    oracle_gradients,
)

from megatron_infoentropy import InfoEntropyConfig, infoentropy_loss
from megatron_infoentropy.integration.arguments import check_megatron_args
from megatron_infoentropy.integration.output import OutputSettings, statistics_processor
from megatron_infoentropy.loss.linear import linear_vocab_parallel_statistics
from megatron_infoentropy.loss.statistics import vocab_parallel_statistics

STEPS = 10
FUSED = ["--infoentropy-fused-linear", "--infoentropy-chunk-tokens=12"]  # 32 tokens: three chunks
UNTIED = "--untie-embeddings-and-output-weights"
TRAINING = [
    *("--mock-data", "--tokenizer-type=NullTokenizer", "--vocab-size=200"),  # padded to 256
    *("--micro-batch-size=2", "--global-batch-size=4", f"--train-iters={STEPS}", "--lr=1e-3"),
    *("--clip-grad=1.0", "--infoentropy-gamma=1"),
]
MODELS = {
    "pp2": [*TINY_MODEL, "--pipeline-model-parallel-size=2"],
    "tp2-tied": [*(f for f in TINY_MODEL if f != UNTIED), "--tensor-model-parallel-size=2"],
}


@pytest.mark.parametrize("model", MODELS)
def test_the_loss_curve_is_that_of_the_unfused_run(model, tmp_path):
    curves = []
    for name, more in (("plain", []), ("fused", FUSED)):
        out = tmp_path / f"{name}.json"
        flags = [*MODELS[model], *TRAINING, *more]
        run_trainer(2, probe_losses.main, (out, "ours"), flags, tmp_path)
        curves.append([loss for loss, _count in json.loads(out.read_text())])
    plain, fused = curves
    assert len(plain) == 2 * STEPS
    assert fused == pytest.approx(plain, rel=3e-6)
    assert plain[-1] < 0.99 * plain[0], "the run did not learn, so equality shows little"


def test_main_grads_that_we_add_to_equal_the_dense_oracle(tmp_path):
    """With gradient accumulation fusion; without it see test_gradient_oracle."""
    layout = PLAIN | LAYOUTS["dp2"]
    flags = [
        *TINY_MODEL,
        *("--mock-data", "--tokenizer-type=NullTokenizer", f"--vocab-size={VOCAB}"),
        f"--micro-batch-size={MICRO_BATCH}",
        f"--global-batch-size={MICRO_BATCH * layout['dp'] * layout['micro_batches']}",
        f"--train-iters={len(GAMMAS)}",
        *("--lr=0", "--min-lr=0", "--weight-decay=0", *FUSED, "--overlap-grad-reduce"),
    ]
    world = layout["dp"]
    run_trainer(world, probe_fused_linear.main, (tmp_path, GAMMAS), flags, tmp_path)
    found = {path.stem: torch.load(path) for path in tmp_path.glob("*.pt")}
    assert len(found) == world
    for index, gamma in enumerate(GAMMAS):
        expected = oracle_gradients(layout, "paper", found, gamma)
        for rank, written in found.items():
            for parameter, gradient in written["gradients"][index].items():
                truth = expected[rank[:3]][parameter]
                error = (gradient.double() - truth).abs().max() / truth.abs().max()
                assert error <= 1e-5, f"rank {rank}, {parameter}: relative error {error:.2e}"


S, B, H, V = 6, 2, 8, 40


def random_case():
    generator = torch.Generator().manual_seed(4)
    hidden = torch.randn(S, B, H, generator=generator)
    weight = torch.randn(V, H, generator=generator)
    return hidden, weight, torch.randint(0, V, (S, B), generator=generator)


def both_on_rank():
    """(value, gradients) through Megatron's own layer and the unfused loss, and through ours."""
    from megatron.core.tensor_parallel.layers import (
        linear_with_grad_accumulation_and_async_allreduce as megatron_linear,
    )

    group = dist.group.WORLD
    whole_hidden, whole_weight, target = random_case()
    results = []
    for fused in (False, True):
        hidden = whole_hidden.clone().requires_grad_()
        weight = whole_weight.chunk(group.size())[group.rank()].clone().requires_grad_()
        if fused:
            got = linear_vocab_parallel_statistics(
                hidden, weight, target, group=group, chunk_tokens=5
            )
        else:
            logits = megatron_linear(hidden, weight, None, False, True, False, tp_group=group)
            got = vocab_parallel_statistics(logits, target, group=group)
        (got.cross_entropy * got.entropy).sum().backward()
        results.append([got.cross_entropy.detach(), hidden.grad, weight.grad])
    return results


def test_values_and_gradients_are_those_of_megatrons_own_layer():
    for theirs, ours in run_forked(both_on_rank, 2):
        for mine, other in zip(ours, theirs, strict=True):
            assert_within(mine, other, rtol=2e-6, atol=2e-5)


def layer(weight, **changes):
    """What the processor relies on of a ColumnParallelLinear."""
    module = torch.nn.Module()
    module.weight = weight if weight is None else torch.nn.Parameter(weight)
    plain = {
        "bias": None,
        "disable_grad_reduce": False,
        "sequence_parallel": False,
        "gradient_accumulation_fusion": False,
    }
    for name, value in (plain | changes).items():
        setattr(module, name, value)
    return module


def process(output_layer, output_weight=None):
    hidden, _, target = random_case()
    settings = OutputSettings(InfoEntropyConfig(fused_linear=True), None, None)
    return statistics_processor(
        hidden_states=hidden,
        output_layer=output_layer,
        output_weight=output_weight,
        labels=target.T,
        loss_mask=None,
        runtime_gather_output=None,
        scale_logits=None,
        context=settings,
    )


def test_the_weight_is_used_only_after_what_waits_for_it_has_run():
    """With --overlap-param-gather a hook of the layer, which is not called, completes it."""
    _, weight, _ = random_case()
    output_layer = layer(torch.zeros_like(weight))

    def arrive(module, _inputs):
        module.weight.data.copy_(weight)

    output_layer.register_forward_pre_hook(arrive)
    assert_within(process(output_layer), process(layer(weight)))


def test_a_tied_layer_takes_the_weight_it_is_handed():
    _, weight, _ = random_case()
    assert_within(process(layer(None), output_weight=weight), process(layer(weight)))


@pytest.mark.parametrize("change", [{"bias": torch.zeros(V)}, {"disable_grad_reduce": True}])
def test_a_layer_that_does_more_is_refused(change):
    with pytest.raises(ValueError, match="output layer without bias whose input gradient is"):
        process(layer(random_case()[1], **change))


def megatron_args(**changes):
    plain = {"trust_remote_code": False, "fp16_lm_cross_entropy": False}
    return SimpleNamespace(**plain | changes)


CANNOT_BE_FUSED = (
    *("use_mup", "defer_embedding_wgrad_compute", "fp8_output_proj"),
    *("use_megatron_fsdp", "use_torch_fsdp2", "tensor_parallel_num_weight_shards"),
)


@pytest.mark.parametrize("flag", CANNOT_BE_FUSED)
def test_flags_that_need_the_layer_called_are_refused(flag):
    derived = {"tensor_parallel_num_weight_shards": {"gtp_weight_remat_size": 2}}
    args = megatron_args(**derived.get(flag, {flag: True}))
    check_megatron_args(args, InfoEntropyConfig())
    with pytest.raises(ValueError, match=f"cannot go with --{flag.replace('_', '-')}"):
        check_megatron_args(args, InfoEntropyConfig(fused_linear=True))


def test_the_functions_of_logits_refuse_the_setting():
    hidden, weight, target = random_case()
    with pytest.raises(ValueError, match="use linear_infoentropy_loss, or the trainer"):
        infoentropy_loss(hidden @ weight.T, target, InfoEntropyConfig(fused_linear=True))
