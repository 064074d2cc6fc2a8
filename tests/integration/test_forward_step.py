"""The forward step of one rank: what it calls the model with, which loss it answers with, and what
the gradients of the global batch are divided by."""

import math
from types import SimpleNamespace

import pytest
import torch
from close import assert_within
from megatron.core.distributed.data_parallel_base import _BaseDataParallel
from megatron.core.distributed.distributed_data_parallel import DistributedDataParallel
from oracle import dense_statistics

from megatron_infoentropy import InfoEntropyConfig
from megatron_infoentropy.integration import step
from megatron_infoentropy.integration.output import (
    OutputSettings,
    pack,
    statistics_processor,
    unpack,
)
from megatron_infoentropy.integration.step import (
    GlobalBatchWeight,
    Groups,
    InfoEntropyForwardStep,
    training_loss,
)
from megatron_infoentropy.loss.objective import configured_statistics

B, S, V = 2, 6, 30


def make_batch():
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, V, (B, S), generator=generator)
    mask = (torch.rand(B, S, generator=generator) > 0.3).float()
    rest = {"tokens": labels.roll(1), "position_ids": torch.arange(S), "attention_mask": None}
    return {"labels": labels, "loss_mask": mask, **rest}


class Model(torch.nn.Module):
    """Answers with dense statistics; writes down how it was asked."""

    vp_stage = config = None

    def __init__(self):
        super().__init__()
        logits = torch.randn(B, S, V, generator=torch.Generator().manual_seed(1)) * 3
        labels = make_batch()["labels"]
        is_top = logits.argmax(-1) == labels
        self.output = torch.stack([*dense_statistics(logits, labels), is_top]).float()
        self.calls = []

    def forward(self, *inputs, output_processor, **options):
        self.calls.append((inputs, options | {"output_processor": output_processor}))
        return self.output

    def compute_language_model_loss(self, labels, logits):
        raise AssertionError("the output processor takes its place")

    def build_schedule_plan(self, *inputs, **options):
        self.calls.append((inputs, options))
        return "plan"


@pytest.fixture
def forward_step(monkeypatch):
    """Of gamma 2, in a world without Megatron's globals."""
    timer = SimpleNamespace(start=lambda: None, stop=lambda: None)
    monkeypatch.setattr(step, "get_timers", lambda: lambda *_, **__: timer)
    args = SimpleNamespace(consumed_train_samples=96, calculate_per_token_loss=False)
    args.check_for_nan_in_loss_and_grad = args.check_for_spiky_loss = False
    monkeypatch.setattr(step, "get_args", lambda: args)
    monkeypatch.setattr(step, "get_rerun_state_machine", lambda: None)
    monkeypatch.setattr(step, "get_batch", lambda *_, **__: make_batch())
    for group in ("tensor_model", "context", "data"):
        monkeypatch.setattr(step.mpu, f"get_{group}_parallel_group", lambda: None)
    observer = SimpleNamespace(add=lambda *_: None)
    return InfoEntropyForwardStep(InfoEntropyConfig(gamma=2.0), V, GlobalBatchWeight(), observer)


@pytest.mark.parametrize("plan", [False, True])
def test_the_model_is_asked_alike_for_its_output_and_for_its_plan(forward_step, plan):
    model, batch = Model(), make_batch()
    answer, _ = forward_step(None, model, return_schedule_plan=plan)
    assert answer is ("plan" if plan else model.output)
    ((inputs, options),) = model.calls
    assert torch.equal(inputs[0], batch["tokens"])
    for name in ("labels", "loss_mask"):
        assert torch.equal(options[name], batch[name])
    assert options["output_processor"] is statistics_processor
    context = options["output_processor_context"]
    assert (context.config.gamma, context.vocab_size) == (2.0, V)


class PlainModel(torch.nn.Module):
    """Has no output processor, and makes its loss without its method for it."""

    vp_stage = config = None
    post_process, mtp_process = True, False

    def __init__(self):
        super().__init__()
        self.output_layer = torch.nn.Linear(V, V, bias=False)

    def forward(self, tokens, positions, attention_mask, labels, loss_mask):
        return self.output_layer(torch.zeros(S, B, V))

    def compute_language_model_loss(self, labels, logits):
        return "its own"


def test_a_model_that_makes_its_loss_elsewhere_is_noticed(forward_step):
    model = PlainModel()
    with pytest.raises(RuntimeError, match=r"PlainModel\.forward computed its loss without"):
        forward_step(None, model)
    assert model.compute_language_model_loss(None, None) == "its own"


def test_validation_is_plain_cross_entropy_whatever_the_objective(forward_step):
    model, batch = Model().eval(), make_batch()
    output, loss_function = forward_step(None, model)
    loss, count, report = loss_function(output)
    expected = (batch["loss_mask"] * model.output[0]).double().sum()
    assert_within(loss, expected, rtol=1e-6)
    assert count == batch["loss_mask"].sum()
    assert_within(report["cross entropy"], torch.stack([expected, count]), rtol=1e-6)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("objective", ["infoentropy", "deft"])
def test_every_statistic_comes_out_of_the_pipeline_as_it_went_in(objective, label_smoothing):
    logits = torch.randn(B, S, V, generator=torch.Generator().manual_seed(2))
    config = InfoEntropyConfig(objective=objective, label_smoothing=label_smoothing)
    asked = {"group": None, "vocab_size": None, "ignore_index": -100}
    statistics = configured_statistics(logits, make_batch()["labels"], config, **asked)
    for name, part in unpack(pack(statistics), config)._asdict().items():
        expected = getattr(statistics, name)
        assert (part is None) == (expected is None), name
        assert part is None or torch.equal(part, expected.float()), name


def inverse_entropy(tokens):
    return 1 / tokens.entropy


@pytest.mark.parametrize("normalization", ["paper", "global"])
def test_a_weight_that_is_infinite_where_masked_spoils_nothing(normalization):
    output, mask = Model().output, make_batch()["loss_mask"]
    masked = torch.where(mask > 0, output, 0).requires_grad_()  # as the output processor gives it
    config = InfoEntropyConfig(
        objective="custom",
        weighting=f"{__name__}:{inverse_entropy.__name__}",
        normalization=normalization,
        detach_weight=False,
    )
    loss, _, report, _ = training_loss(mask, masked, config, Groups(None, None))
    loss.backward()
    ce, weight = output[0][mask > 0].double(), 1 / output[1][mask > 0].double()
    alpha = mask.sum() / weight.sum() if normalization == "paper" else 1
    assert_within(loss.detach(), alpha * (weight * ce).sum(), rtol=1e-6)
    assert_within(report["weight"][0], weight.sum(), rtol=1e-6)
    assert masked.grad.isfinite().all()


class Chunk:
    scale = None

    def scale_gradients(self, factor):
        self.scale = float(factor)


@pytest.fixture
def summed(monkeypatch):
    """Groups that were summed over, one of them of two ranks, without any rank; then token counts.

    What Megatron's own finalize_model_grads is handed is the last entry.
    """
    received = []

    def all_reduce(total, group):
        received.append(group)
        total.mul_(2 if group == "data with weight shards" else 1)

    monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
    finalize = lambda model, tokens=None, **_: received.append(tokens)  # noqa: E731
    monkeypatch.setattr(step, "finalize_model_grads", finalize)
    return received


@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("normalization", ["paper", "none", "global"])
def test_a_mask_of_fractions_is_divided_by_its_own_sum(
    forward_step, summed, monkeypatch, normalization, per_token
):
    """Megatron divides by a whole number of tokens, at once or over the whole batch."""
    mask = torch.linspace(0, 1, B * S).view(B, S) ** 2  # whose sum is no whole number
    monkeypatch.setattr(step, "get_batch", lambda *_, **__: make_batch() | {"loss_mask": mask})
    step.get_args().calculate_per_token_loss = per_token or normalization == "global"
    forward_step.config = InfoEntropyConfig(normalization=normalization)
    model, chunk = Model(), Chunk()
    output, loss_function = forward_step(None, model)
    loss, count, _ = loss_function(output)
    assert count.dtype == torch.int32
    assert count == math.ceil(mask.sum())
    divided = loss / count
    if normalization == "global":
        groups = SimpleNamespace(pp=None, dp_cp=None)
        forward_step.batch_weight.finalize_model_grads([chunk], count, pg_collection=groups)
        divided = loss * chunk.scale
    elif per_token:
        forward_step.batch_weight.finalize_per_token([chunk], count)
        divided = loss / summed[-1]
    ce, weight = model.output[0].double(), 1 + model.output[1].double()
    whole = mask.sum() if normalization == "none" else (mask * weight).sum()
    assert_within(divided, (mask * weight * ce).sum() / whole, rtol=1e-6)


@pytest.mark.parametrize(
    ("more", "data"),
    [
        ({}, "data"),
        ({"dp_cp_gtp_remat": None}, "data"),
        ({"dp_cp_gtp_remat": "data with weight shards"}, "data with weight shards"),
    ],
)
def test_weights_are_summed_over_every_rank_that_has_tokens(summed, more, data):
    chunk, weight = Chunk(), GlobalBatchWeight()
    for part in (1.0, 3.0):
        weight.add(torch.tensor(part))
    groups = SimpleNamespace(pp="pipeline", dp_cp="data", **more)
    weight.finalize_model_grads([chunk], torch.tensor(7), pg_collection=groups)
    assert summed == [None, "pipeline", data]
    assert chunk.scale == (0.25 if data == "data" else 0.125)


@pytest.mark.parametrize(
    ("tokens", "total", "scale"),
    [(3000, 8.0, 512.0), (2**30, 0.0, None), (2**30, 1e-40, None), (2**30, math.nan, math.nan)],
)
def test_what_losses_were_divided_by_comes_back_and_only_nan_is_not_finite(
    summed, tokens, total, scale
):
    chunk, weight = Chunk(), GlobalBatchWeight(tokens)
    assert weight.unit == (4096 if tokens == 3000 else tokens)
    weight.add(torch.tensor(total))
    weight.finalize_model_grads([chunk], pg_collection=SimpleNamespace(pp=None, dp_cp=None))
    if scale is None:
        assert math.isfinite(chunk.scale)
    else:
        assert chunk.scale == pytest.approx(scale, nan_ok=True)


def test_a_wrapper_that_does_not_scale_gradients_is_refused(summed):
    class Wrapper(_BaseDataParallel):
        def __init__(self):
            torch.nn.Module.__init__(self)

    with pytest.raises(ValueError, match="which Wrapper does not do; use 'paper' or 'none'"):
        GlobalBatchWeight().finalize_model_grads([Wrapper()])
    assert DistributedDataParallel.scale_gradients is not _BaseDataParallel.scale_gradients


def what_it_sees(tokens):
    assert torch.equal(tokens.target, make_batch()["labels"])
    assert tokens.samples == 96
    return torch.ones_like(tokens.entropy)


def test_a_weighting_in_the_trainer_sees_labels_and_samples(forward_step):
    forward_step.config = InfoEntropyConfig(
        objective="custom", weighting=f"{__name__}:{what_it_sees.__name__}"
    )
    output, loss_function = forward_step(None, Model())
    assert loss_function(output)[0].isfinite()


def fuse(weight, bias=None, disable_grad_reduce=False, hook=None):
    """What the processor makes of an output layer whose logits never are in memory."""
    layer = torch.nn.Linear(8, V, bias=False)
    layer.weight.data.copy_(weight)
    layer.bias, layer.disable_grad_reduce = bias, disable_grad_reduce
    layer.sequence_parallel = layer.gradient_accumulation_fusion = False
    if hook:
        layer.register_forward_pre_hook(hook)
    return statistics_processor(
        hidden_states=torch.randn(S, B, 8, generator=torch.Generator().manual_seed(4)),
        output_layer=layer,
        output_weight=None,
        labels=make_batch()["labels"],
        loss_mask=None,
        runtime_gather_output=None,
        scale_logits=None,
        context=OutputSettings(InfoEntropyConfig(fused_linear=True), None, None),
    )


def test_the_weight_is_used_only_after_what_waits_for_it_has_run():
    """With --overlap-param-gather a hook of the layer, which is not called, completes it."""
    weight = torch.randn(V, 8, generator=torch.Generator().manual_seed(5))

    def arrive(module, _inputs):
        module.weight.data.copy_(weight)

    assert torch.equal(fuse(0 * weight, hook=arrive), fuse(weight))


@pytest.mark.parametrize(
    "change", [{"bias": torch.nn.Parameter(torch.zeros(V))}, {"disable_grad_reduce": True}]
)
def test_an_output_layer_that_does_more_is_not_fused(change):
    with pytest.raises(ValueError, match="output layer without bias whose input gradient is"):
        fuse(torch.zeros(V, 8), **change)
