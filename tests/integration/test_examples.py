"""The examples for other trainers: right in every number, and they run."""

import copy
import importlib.util
import re
import runpy
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from close import assert_within
from launch import run_trainer
from oracle import dense_statistics, dense_weight

from megatron_infoentropy import InfoEntropyConfig

EXAMPLES = Path(__file__).parents[2] / "examples"
GAMMA, BATCH = 2.0, 2


def load(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def example():
    return load("hf_trainer")


@pytest.fixture
def llama(example):
    torch.manual_seed(0)
    model = example.tiny_llama()
    with torch.no_grad():  # far from uniform, so that weights differ
        model.lm_head.weight.mul_(8)
    return model


def pieces():
    """Two micro-batches, whose masked shares are far from equal."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 256, (2 * BATCH, 12), generator=generator)
    labels = tokens.clone()
    labels[:BATCH, :9] = -100
    labels[3, 5] = -100
    return [{"input_ids": t, "labels": y} for t, y in zip(tokens, labels, strict=True)]


def trainer_of(example, model, folder, config, accumulation=1):
    """A Trainer whose one step leaves the weights alone, and the gradients of that step."""
    from transformers import Trainer, TrainerCallback, TrainingArguments

    gradients = {}

    class Keep(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model, **_):
            gradients.update({n: p.grad.clone() for n, p in model.named_parameters()})

    arguments = TrainingArguments(
        output_dir=folder,
        max_steps=1,
        per_device_train_batch_size=2 * BATCH // accumulation,
        per_device_eval_batch_size=2 * BATCH,
        gradient_accumulation_steps=accumulation,
        learning_rate=0.0,
        max_grad_norm=0.0,
        logging_steps=1,
        train_sampling_strategy="sequential",
        **{"save_strategy": "no", "report_to": "none", "disable_tqdm": True, "use_cpu": True},
    )
    trainer = Trainer(
        model,
        arguments,
        train_dataset=pieces(),
        eval_dataset=pieces(),
        compute_loss_func=partial(example.causal_loss, config=config),
        callbacks=[Keep()],
    )
    return trainer, gradients


def dense_step(model, gamma, accumulation, normalization="paper"):
    """The objective of one step in float64, from its definition; (objective, gradients)."""
    truth = copy.deepcopy(model).double()
    parts = torch.utils.data.default_collate(pieces())
    total, tokens = 0, (parts["labels"][:, 1:] != -100).sum()
    rows = 2 * BATCH // accumulation
    for start in range(0, 2 * BATCH, rows):
        ids, labels = (parts[k][start : start + rows] for k in ("input_ids", "labels"))
        target = labels[:, 1:]
        ce, entropy, _ = dense_statistics(truth(ids).logits[:, :-1], target)
        weight = dense_weight(ce, entropy, "infoentropy", gamma, 1.0).detach()
        weight = weight * (target != -100)
        alpha = (target != -100).sum() / weight.sum() if normalization == "paper" else 1.0
        total = total + alpha * (weight * ce).sum() / tokens
    total.backward()
    return total.detach(), {n: p.grad for n, p in truth.named_parameters()}


@pytest.mark.parametrize(
    ("accumulation", "normalization"), [(1, "paper"), (2, "paper"), (2, "none")]
)
def test_a_trainers_step_equals_dense_float64(
    example, llama, tmp_path, accumulation, normalization
):
    config = InfoEntropyConfig(gamma=GAMMA, normalization=normalization)
    trainer, gradients = trainer_of(example, llama, tmp_path, config, accumulation)
    logged = trainer.train().training_loss
    objective, expected = dense_step(llama, GAMMA, accumulation, normalization)
    assert logged == pytest.approx(float(objective), rel=1e-5)
    for name, gradient in gradients.items():
        size = expected[name].abs().max()
        assert_within(gradient, expected[name], atol=2e-5 * size)


def test_evaluation_is_plain_cross_entropy(example, llama, tmp_path):
    trainer, _ = trainer_of(example, llama, tmp_path, InfoEntropyConfig(gamma=GAMMA))
    plain, _ = dense_step(llama, 0.0, 1)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(float(plain), rel=1e-5)


def test_gamma_zero_is_the_models_own_loss(example, llama):
    batch = torch.utils.data.default_collate(pieces())
    own = llama(**batch).loss
    outputs = SimpleNamespace(logits=llama(batch["input_ids"]).logits)
    mine = example.causal_loss(outputs, batch["labels"], config=InfoEntropyConfig(gamma=0.0))
    assert_within(mine, own, rtol=2e-6)


def test_the_hugging_face_example_learns(example):
    assert example.main(steps=8)["eval_loss"] < 4.5  # from 5.5, ln 256


def test_the_page_about_other_trainers_names_files_that_exist():
    page = EXAMPLES.parent / "docs" / "drop-in.md"
    links = re.findall(r"\]\(([^)#:]+)\)", page.read_text())
    assert links
    for link in links:
        assert (page.parent / link).exists(), link


def run_example(name):
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")


def test_the_drop_in_example_trains(tmp_path):
    """It asks for "cuda" and has dropout, at which Megatron would raise a false alarm on a CPU."""
    said = run_trainer(2, run_example, ("drop_in",), [], tmp_path)
    objectives = [float(x) for x in re.findall(r"objective ([\d.]+)", said)]
    assert len(objectives) == 4
    assert objectives[-1] < 0.8 * objectives[0]
    assert "RNG state changed" not in said
