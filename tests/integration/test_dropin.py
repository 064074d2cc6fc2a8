"""The bound method, on a stand-in for Megatron's LanguageModule: values, modes, refusals."""

import copy
from types import SimpleNamespace

import pytest
import torch
from close import assert_within
from oracle import dense_objective, dense_statistics

from megatron_infoentropy import InfoEntropyConfig, infoentropy_loss
from megatron_infoentropy.integration import bound_loss, use_infoentropy_loss

B, S, V = 3, 5, 40


class LanguageModel(torch.nn.Module):
    """What the binding relies on, no more."""

    def __init__(self, ranks=1, config=None, **attributes):
        super().__init__()
        self.config = SimpleNamespace(**config or {})
        group = SimpleNamespace(size=lambda: ranks, rank=lambda: 0) if ranks > 1 else None
        self.pg_collection = SimpleNamespace(tp=group)
        self.output_layer = SimpleNamespace(output_size_per_partition=V // ranks)
        for name, value in attributes.items():
            setattr(self, name, value)

    def compute_language_model_loss(self, labels, logits):
        raise AssertionError("Megatron's own loss was called")

    def forward(self, logits, labels=None, *, loss_mask=None, output_processor=None):
        if output_processor is not None:
            return output_processor(logits)
        return logits if labels is None else self.compute_language_model_loss(labels, logits)


def bound(config=None, **options):
    return use_infoentropy_loss(LanguageModel(), config, **options)


def make_case():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(S, B, V, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, V, (B, S), generator=generator)
    labels[1, 2:] = -100
    return logits, labels


OTHERS = ("lin_focal", "eaft", "dft", "deft", "eslm", "entrodrop")


@pytest.mark.parametrize(
    "settings",
    [
        *({"gamma": 2.0, "normalization": how} for how in ("paper", "global", "none")),
        *({"objective": other, "gamma": 0.5, "quantile": 0.4} for other in OTHERS),
    ],
    ids=lambda settings: settings.get("objective", settings.get("normalization")),
)
def test_mean_over_valid_tokens_is_the_objective_of_the_function(settings):
    logits, labels = make_case()
    config = InfoEntropyConfig(**settings)
    ours, whole = (logits.clone().requires_grad_() for _ in range(2))
    loss = bound(config).compute_language_model_loss(labels, ours)
    assert loss.shape == (B, S)
    mean = loss.sum() / (labels != -100).sum()
    expected = infoentropy_loss(whole, labels.T, config)
    for each in (mean, expected):
        each.backward()
    assert_within(mean, expected, rtol=1e-12)
    assert_within(ours.grad, whole.grad, atol=1e-14)


def test_a_weighting_that_asks_for_the_samples_is_told_those_that_were_set():
    logits, labels = make_case()
    config = InfoEntropyConfig(objective="entrodrop", gamma=0.5, quantile=0.9)
    model = use_infoentropy_loss(LanguageModel(), config)
    for samples in (0, 7):
        bound_loss(model).samples = samples
        mean = model.compute_language_model_loss(labels, logits).sum() / (labels != -100).sum()
        assert_within(mean, infoentropy_loss(logits, labels.T, config, samples=samples), rtol=1e-12)


def test_a_wrapped_model_is_bound_inside():
    class Transparent(torch.nn.Module):
        """Like FSDP: hands on what it does not have."""

        def __getattr__(self, name):
            try:
                return super().__getattr__(name)
            except AttributeError:
                return getattr(super().__getattr__("module"), name)

    inner = LanguageModel()
    wrapped = Transparent()
    wrapped.module = inner
    assert use_infoentropy_loss(wrapped) is wrapped
    logits, labels = make_case()
    assert inner.compute_language_model_loss(labels, logits).isfinite().all()


def test_pipeline_chunks_are_bound_together():
    chunks = [LanguageModel(), LanguageModel()]
    assert use_infoentropy_loss(chunks) is chunks
    logits, labels = make_case()
    for chunk in chunks:
        chunk(logits, labels)
        assert bound_loss(chunk).training_calls == 1


def test_a_mask_that_forward_is_given_takes_part_in_training():
    logits, labels = make_case()
    mask = torch.rand(B, S, generator=torch.Generator().manual_seed(1)) * 2 - 0.5
    mask = mask.clamp(0, 1).double()  # of zeros, ones and fractions
    model = bound(InfoEntropyConfig(gamma=2.0))
    loss = model(logits, labels, loss_mask=mask)
    valid = mask * (labels != -100)
    batch = (logits.transpose(0, 1), labels, mask)
    assert_within((loss * mask).sum() / valid.sum(), dense_objective([batch], gamma=2.0), rtol=1e-9)
    without = model(logits, labels)  # the mask of an earlier micro-batch is not used again
    assert_within(without, bound(InfoEntropyConfig(gamma=2.0))(logits, labels), rtol=1e-12)
    plain = model.eval()(logits, labels, loss_mask=mask)
    assert_within(plain, dense_statistics(logits.transpose(0, 1), labels)[0], rtol=1e-12)


def test_labels_of_any_integer_type_are_widened_before_they_are_masked():
    """In uint8 the ignored label -100 is 156."""
    logits, labels = make_case()
    mask, labels = torch.ones(B, S).tril(), labels.clamp_min(0)
    expected = bound()(logits, labels, loss_mask=mask)
    assert torch.equal(bound()(logits, labels.to(torch.uint8), loss_mask=mask), expected)


def test_a_bound_model_can_be_copied_and_bound_again():
    logits, labels = make_case()
    model = bound(InfoEntropyConfig(gamma=2.0))
    copied = copy.deepcopy(model)
    use_infoentropy_loss(model, InfoEntropyConfig(gamma=0.0))
    assert_within(
        copied(logits, labels), bound(InfoEntropyConfig(gamma=2.0))(logits, labels), rtol=0
    )
    assert_within(
        model(logits, labels), bound(InfoEntropyConfig(gamma=0.0))(logits, labels), rtol=0
    )
    assert (bound_loss(copied).training_calls, bound_loss(copied).config.gamma) == (1, 2.0)
    assert (bound_loss(model).training_calls, bound_loss(model).config.gamma) == (1, 0.0)


def test_a_run_can_prove_which_loss_it_used(caplog):
    logits, labels = make_case()
    with caplog.at_level("INFO"):
        model = bound(InfoEntropyConfig(gamma=2.0))
    assert "InfoEntropy loss bound to LanguageModel: InfoEntropyConfig(objective=" in caplog.text
    model(logits, labels)
    model.eval()(logits, labels)
    model(logits)  # without labels there is no loss to compute
    proof = bound_loss(model)
    assert (proof.training_calls, proof.evaluation_calls, proof.config.gamma) == (1, 1, 2.0)
    with pytest.raises(ValueError, match="no InfoEntropy loss is bound to LanguageModel"):
        bound_loss(LanguageModel())
    model.compute_language_model_loss = lambda labels, logits: logits.sum()
    with pytest.raises(ValueError, match="bound to LanguageModel was replaced"):
        bound_loss(model)


def test_a_forward_that_makes_its_loss_elsewhere_is_an_error_not_a_fallback():
    class Fused(LanguageModel):
        def forward(self, logits, lm_labels):
            return logits.sum()

    with pytest.raises(RuntimeError, match="without compute_language_model_loss"):
        use_infoentropy_loss(Fused())(*make_case())


def test_a_stage_without_an_output_layer_may_be_given_labels():
    stage = LanguageModel(post_process=False, forward=lambda logits, labels: logits)
    del stage.output_layer
    logits, labels = make_case()
    assert torch.equal(use_infoentropy_loss(stage)(logits, labels), logits)


def inside_another():
    model = torch.nn.Module()
    model.language_model = LanguageModel()
    return model


FUSED = {"cross_entropy_loss_fusion": True, "cross_entropy_fusion_impl": "linear"}


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (torch.nn.Linear(2, 2), r"LanguageModule .* got Linear"),
        (inside_another(), r"got Module without .*; bind its \.language_model"),
        (LanguageModel(config={"mtp_num_layers": 1}), "multi-token-prediction heads"),
        (LanguageModel(config=FUSED), "cross_entropy_fusion_impl='linear' would compute"),
        (
            LanguageModel(ranks=2, parallel_output=False),
            "built with parallel_output=False: it gathers logits",
        ),
        (
            LanguageModel(ranks=2, output_layer=torch.nn.Linear(2, V)),
            "states neither its output layer's share of the vocabulary nor a",
        ),
        (LanguageModel(fp16_lm_cross_entropy=True), "built with fp16_lm_cross_entropy=True"),
    ],
)
def test_what_cannot_work_is_refused_in_words(model, message):
    with pytest.raises(ValueError, match=message):
        use_infoentropy_loss([model])


def test_settings_that_a_bound_loss_cannot_serve_are_refused_in_words():
    logits, labels = make_case()
    with pytest.raises(ValueError, match="fused_linear needs the hidden states"):
        bound(InfoEntropyConfig(fused_linear=True))
    with pytest.raises(ValueError, match="use linear_infoentropy_loss, or the trainer"):
        infoentropy_loss(logits, labels.T, InfoEntropyConfig(fused_linear=True))
    with pytest.raises(ValueError, match=r"mtp_loss='weighted' is for .*pretrain alone: leave it"):
        bound(InfoEntropyConfig(mtp_loss="weighted"))
    schedule = {"gamma_schedule": "linear", "gamma_samples": 10}
    with pytest.raises(ValueError, match=r"pass config.at\(samples\)"):
        bound(InfoEntropyConfig(**schedule))
    model, later = bound(InfoEntropyConfig(gamma=0.0)), InfoEntropyConfig(gamma=0.0, **schedule)
    bound_loss(model).config = later.at(10)
    assert torch.equal(model(logits, labels), bound(InfoEntropyConfig(gamma=1.0))(logits, labels))


@pytest.mark.parametrize("name", ["native", "te"])
def test_fusions_inside_the_method_give_way(name):
    logits, labels = make_case()
    model = LanguageModel(config=FUSED | {"cross_entropy_fusion_impl": name})
    assert use_infoentropy_loss(model)(logits, labels).isfinite().all()


@pytest.mark.parametrize(
    "adapter", [{}, {"output_layer": torch.nn.Linear(2, V), "vocab_size": V}], ids=["", "adapter"]
)
def test_gathered_logits_are_refused_also_through_an_adapter(adapter):
    """Half the columns expected, the whole vocabulary given: off by ln 2 if it were accepted."""
    model = use_infoentropy_loss(LanguageModel(ranks=2, **adapter))
    with pytest.raises(ValueError, match="vocabulary-sharded logits with 20 columns"):
        model(*make_case())
