"""The bound method, on a stand-in for Megatron's LanguageModule: values, modes, refusals."""

from types import SimpleNamespace

import pytest
import torch
from close import assert_within
from oracle import dense_objective, dense_statistics

from megatron_infoentropy import InfoEntropyConfig
from megatron_infoentropy.integration import use_infoentropy_loss

B, S, V = 3, 5, 40


class LanguageModel(torch.nn.Module):
    """What the binding relies on, no more."""

    def __init__(self, mtp_num_layers=None, columns=V):
        super().__init__()
        self.config = SimpleNamespace(mtp_num_layers=mtp_num_layers)
        self.pg_collection = SimpleNamespace(tp=None)
        self.output_layer = SimpleNamespace(output_size_per_partition=columns, output_size=columns)

    def compute_language_model_loss(self, labels, logits):
        raise AssertionError("Megatron's own loss was called")


def make_case():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(S, B, V, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, V, (B, S), generator=generator)
    labels[1, 2:] = -100
    return logits, labels


@pytest.mark.parametrize("normalization", ["paper", "global", "none"])
def test_mean_over_valid_tokens_is_the_objective(normalization):
    logits, labels = make_case()
    config = InfoEntropyConfig(gamma=2.0, normalization=normalization)
    model = use_infoentropy_loss(LanguageModel(), config)
    ours = logits.clone().requires_grad_()
    loss = model.compute_language_model_loss(labels, ours)
    assert loss.shape == (B, S)
    mean = loss.sum() / (labels != -100).sum()
    mean.backward()
    truth = logits.clone().requires_grad_()
    batch = (truth.transpose(0, 1), labels, torch.ones(B, S))
    expected = dense_objective([batch], gamma=2.0, normalization=normalization)
    expected.backward()
    assert_within(mean, expected, rtol=1e-12)
    assert_within(ours.grad, truth.grad, atol=1e-13)


def test_evaluation_is_plain_cross_entropy_whatever_the_objective():
    logits, labels = make_case()
    model = use_infoentropy_loss(LanguageModel(), InfoEntropyConfig(gamma=2.0)).eval()
    expected = dense_statistics(logits.transpose(0, 1), labels)[0]
    assert_within(model.compute_language_model_loss(labels, logits), expected, rtol=1e-12)


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


def test_what_cannot_work_is_refused_in_words():
    with pytest.raises(ValueError, match=r"LanguageModule .* got Linear"):
        use_infoentropy_loss(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="multi-token-prediction heads"):
        use_infoentropy_loss(LanguageModel(mtp_num_layers=1))


def test_gathered_logits_are_refused():
    """Half the columns expected, the whole vocabulary given: off by ln 2 if it were accepted."""
    model = use_infoentropy_loss(LanguageModel(columns=V // 2))
    model.pg_collection.tp = SimpleNamespace(size=lambda: 2, rank=lambda: 0)
    logits, labels = make_case()
    with pytest.raises(ValueError, match="vocabulary-sharded logits with 20 columns"):
        model.compute_language_model_loss(labels, logits)
