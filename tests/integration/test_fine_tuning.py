"""A Hugging Face model trained further, as docs/convert.md says: in, a step, and out again."""

import json
import shutil
from functools import partial
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import plain_run
import pytest
import torch
import yaml
from convert.tiny_tokenizer import write_gpt2_tokenizer, write_qwen2_tokenizer
from launch import run_trainer
from run_command import infoentropy
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from megatron_infoentropy.data.indexed import IndexedReader
from megatron_infoentropy.evaluate.runlog import parse_log
from megatron_infoentropy.launch.job import TrainingJob
from megatron_infoentropy.launch.train import build_command

TINY = Path(__file__).parents[2] / "examples" / "tiny.yaml"
LENGTH = 64
# Beside these sizes everything is as transformers has it by default.
SIZES: dict[str, Any] = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES |= {"intermediate_size": 96, "bos_token_id": 0, "eos_token_id": 0, "initializer_range": 0.1}
GROUPED = SIZES | {"num_key_value_heads": 2}
# The other kinds start so in convert/test_trained.py: what differs between them are flags alone.
MODELS: dict[str, dict[str, Any]] = {
    "qwen2": GROUPED | {"vocab_size": 400},  # more rows than the tokenizer has ids, as Qwen's
    "qwen3_moe": GROUPED
    | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 96},
    "gpt2": SIZES | {"n_inner": None},
}


def write_model(folder: Path, kind: str, vocabulary: int) -> torch.nn.Module:
    torch.manual_seed(2)
    config = AutoConfig.for_model(kind, **{"vocab_size": vocabulary} | MODELS[kind])
    model = AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        if parameter.ndim == 1:  # norms are all 1 and biases 0: mistakes would not show
            parameter.data += 0.1 * torch.randn(parameter.shape)
    model.save_pretrained(folder)
    return model


def write_recipe(start: Path, samples: int) -> Path:
    """Add to model.yaml what its user adds, so that the first batch is all of the data."""
    recipe, tiny = yaml.safe_load((start / "model.yaml").read_text()), yaml.safe_load(TINY.open())
    recipe["model"]["seq-length"] = LENGTH
    recipe["batch"] = dict.fromkeys(("micro-batch-size", "global-batch-size"), samples)
    recipe["batch"]["train-iters"] = 1
    recipe["optimizer"] = tiny["optimizer"] | {"lr": 0.0, "min-lr": 0.0, "lr-warmup-iters": 0}
    recipe["log"] = tiny["log"] | {"eval-iters": 0}
    path = start.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(recipe))
    return path


def first_loss(job: TrainingJob, folder: Path) -> float:
    """Train as `infoentropy train` does, on a rank that need not import Megatron first."""
    words = build_command(job).words
    flags = words[words.index("megatron_infoentropy.pretrain") + 1 :]
    job.run.mkdir()
    log = parse_log(run_trainer(1, plain_run.main, (), flags, folder).splitlines())
    values = [values["cross entropy"] for values in log.training.values()]
    return values[0]


@pytest.mark.parametrize("kind", MODELS)
def test_training_starts_at_the_loss_of_transformers_and_the_model_comes_back(
    tmp_path: Path, kind: str
) -> None:
    hf, start, run = tmp_path / "hf", tmp_path / "start", tmp_path / "run"
    text, corpus = tmp_path / "text", tmp_path / "corpus.jsonl"
    text.write_text(topics["for"])
    corpus.write_text(json.dumps({"text": topics["for"]}) + "\n")
    write = write_qwen2_tokenizer if kind == "qwen2" else write_gpt2_tokenizer
    tokenizer = write(tmp_path / "tokenizer")
    model = write_model(hf, kind, 258)
    for file in tokenizer.iterdir():
        shutil.copy(file, hf)

    say = partial(infoentropy, cwd=tmp_path)
    say("convert-from-hf", "hf", "--output", "start", "--text", "text")
    say("preprocess", "--input", corpus, "--tokenizer", "hf", "--output", "tokens/train")
    tokens = torch.from_numpy(IndexedReader(tmp_path / "tokens/train/all").tokens.astype(int))
    samples = (len(tokens) - 1) // LENGTH
    flags = ["--pretrained-checkpoint", str(start)]
    if kind == "gpt2":  # its configuration asks for dropout, and with it no loss is transformers'
        assert yaml.safe_load((start / "model.yaml").read_text())["model"]["hidden-dropout"] == 0.1
        flags += ["--hidden-dropout", "0", "--attention-dropout", "0"]
    recipe = write_recipe(start, samples)
    job = TrainingJob(recipe, tmp_path / "tokens", hf, run, extra_flags=tuple(flags))
    loss = first_loss(job, tmp_path)
    say("convert", "run/checkpoints", "--tokenizer", "hf", "--output", "back", "--text", "text")

    batch = tokens[: samples * LENGTH].view(samples, LENGTH)
    targets = tokens[1 : samples * LENGTH + 1]
    with torch.no_grad():
        logits = model(batch).logits.flatten(0, 1)
    expected = torch.nn.functional.cross_entropy(logits, targets).item()
    assert loss == pytest.approx(expected, abs=2e-5)
    assert abs(expected - torch.tensor(258.0).log().item()) > 0.2, "a loss that says something"
    there, back = (load_file(tmp_path / name / "model.safetensors") for name in ("hf", "back"))
    assert there.keys() == back.keys()
    for name, tensor in there.items():
        assert torch.equal(back[name], tensor), name
