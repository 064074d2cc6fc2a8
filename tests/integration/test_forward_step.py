"""The forward step of one rank: what it calls the model with, and which loss it answers with."""

import math
from types import SimpleNamespace

import pytest
import torch
from close import assert_within
from oracle import dense_statistics

from megatron_infoentropy import InfoEntropyConfig
from megatron_infoentropy.integration import step
from megatron_infoentropy.integration.output import pack, statistics_processor, unpack
from megatron_infoentropy.integration.step import Groups, InfoEntropyForwardStep, training_loss
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
        options["output_processor"] = output_processor
        self.calls.append(("forward", inputs, options))
        return self.output

    def compute_language_model_loss(self, labels, logits):
        raise AssertionError("the output processor takes its place")

    def build_schedule_plan(self, *inputs, **options):
        self.calls.append(("plan", inputs, options))
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
    return InfoEntropyForwardStep(InfoEntropyConfig(gamma=2.0), V, None, None)


@pytest.mark.parametrize("kind", ["forward", "plan"])
def test_the_model_is_asked_alike_for_its_output_and_for_its_plan(forward_step, kind):
    model, batch = Model(), make_batch()
    answer, _ = forward_step(None, model, return_schedule_plan=kind == "plan")
    assert answer is (model.output if kind == "forward" else "plan")
    ((called, inputs, options),) = model.calls
    assert called == kind
    assert torch.equal(inputs[0], batch["tokens"])
    for name in ("labels", "loss_mask"):
        assert torch.equal(options[name], batch[name])
    assert options["output_processor"] is statistics_processor
    assert options["output_processor_context"].config.gamma == 2.0
    assert options["output_processor_context"].vocab_size == V


class PlainModel(torch.nn.Module):
    """Has no output processor: its forward makes its loss itself, by its method or not."""

    vp_stage = config = None
    post_process, mtp_process = True, False

    def __init__(self, by_method):
        super().__init__()
        self.by_method = by_method
        self.output_layer = torch.nn.Linear(V, V, bias=False)
        self.logits = torch.randn(S, B, V, generator=torch.Generator().manual_seed(1)) * 3

    def forward(self, tokens, positions, attention_mask, labels, loss_mask):
        loss = self.compute_language_model_loss if self.by_method else (lambda *_: self.logits)
        return loss(labels, self.logits)

    def compute_language_model_loss(self, labels, logits):
        return "its own"


def test_a_model_without_output_processors_answers_with_statistics(forward_step):
    model, batch = PlainModel(by_method=True), make_batch()
    output, _ = forward_step(None, model)
    statistics = dense_statistics(model.logits.transpose(0, 1), batch["labels"])
    for mine, expected in zip(output, statistics, strict=False):
        assert_within(mine, expected * batch["loss_mask"], rtol=1e-5, atol=1e-6)
    assert model.compute_language_model_loss(None, None) == "its own"


def test_a_model_that_makes_its_loss_elsewhere_is_noticed(forward_step):
    with pytest.raises(RuntimeError, match=r"PlainModel\.forward computed its loss without"):
        forward_step(None, PlainModel(by_method=False))


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


@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("normalization", ["paper", "none", "global"])
def test_a_mask_of_fractions_is_divided_by_its_own_sum(
    forward_step, monkeypatch, normalization, per_token
):
    """Megatron divides by a whole number of tokens, at once or over the whole batch."""
    mask = torch.linspace(0, 1, B * S).view(B, S) ** 2  # whose sum is no whole number
    monkeypatch.setattr(step, "get_batch", lambda *_, **__: make_batch() | {"loss_mask": mask})
    step.get_args().calculate_per_token_loss = per_token or normalization == "global"
    model, batch_weight = Model(), step.GlobalBatchWeight()
    config = InfoEntropyConfig(normalization=normalization)
    observer = SimpleNamespace(add=lambda *_: None)
    forward = InfoEntropyForwardStep(config, V, batch_weight, observer)
    output, loss_function = forward(None, model)
    loss, count, _ = loss_function(output)
    assert count.dtype == torch.int32
    assert count == math.ceil(mask.sum())
    divided = loss / count
    if step.get_args().calculate_per_token_loss:
        received = []
        finalize = lambda model, tokens=None, **_: received.append(tokens)  # noqa: E731
        monkeypatch.setattr(step, "finalize_model_grads", finalize)
        monkeypatch.setattr(torch.distributed, "all_reduce", lambda *_, **__: None)
        chunk = SimpleNamespace(scale_gradients=received.append)
        if normalization == "global":
            groups = SimpleNamespace(pp=None, dp_cp=None)
            batch_weight.finalize_model_grads([chunk], count, pg_collection=groups)
            divided = loss * received[-1]
        else:
            batch_weight.finalize_per_token([chunk], count)
            divided = loss / received[0]
    ce, weight = model.output[0].double(), 1 + model.output[1].double()
    whole = mask.sum() if normalization == "none" else (mask * weight).sum()
    assert_within(divided, (mask * weight * ce).sum() / whole, rtol=1e-6)


def what_it_sees(tokens):
    assert torch.equal(tokens.target, make_batch()["labels"])
    assert tokens.samples == 96
    return torch.ones_like(tokens.entropy)


def test_a_weighting_in_the_trainer_sees_labels_and_samples(forward_step):
    forward_step.config = InfoEntropyConfig(
        objective="custom", weighting=f"{__name__}:{what_it_sees.__name__}"
    )
    forward_step.batch_weight = step.GlobalBatchWeight()
    forward_step.observer = SimpleNamespace(add=lambda *_: None)
    output, loss_function = forward_step(None, Model())
    assert loss_function(output)[0].isfinite()
