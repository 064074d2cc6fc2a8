"""A model with more rows than its tokenizer has tokens, as every Qwen: they stay in the model."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from run_command import infoentropy
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM

from megatron_infoentropy.evaluate.runlog import read_log

TINY = Path(__file__).parents[2] / "examples" / "tiny.yaml"
TOKENS, ROWS, LENGTH = 50, 61, 32
WORDS = [f"t{1 + 7 * i % 40}" for i in range(LENGTH - 1)]  # and the end token


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The model `hf`, its import `start`, and a training `run` from there that changes nothing.

    Every document is as long as a sequence, so that every sample is the same one.
    """
    folder = tmp_path_factory.mktemp("rows")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=ROWS, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=LENGTH, initializer_range=0.3,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder / "hf")
    tokenizer = Tokenizer(models.WordLevel({f"t{i}": i for i in range(TOKENS)}, unk_token="t0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(folder / "hf" / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": f"t{TOKENS - 1}"}
    (folder / "hf" / "tokenizer_config.json").write_text(json.dumps(settings))
    line = json.dumps({"text": " ".join(WORDS)}) + "\n"
    (folder / "text.jsonl").write_text(line * 50)
    infoentropy(
        *("preprocess", "--input", "text.jsonl", "--tokenizer", "hf", "--output", "data/train"),
        cwd=folder,
    )
    infoentropy("convert-from-hf", "hf", "--output", "start", cwd=folder)
    sections = yaml.safe_load(TINY.read_text()) | yaml.safe_load(
        (folder / "start" / "model.yaml").read_text()
    )
    (folder / "recipe.yaml").write_text(yaml.safe_dump(sections))
    infoentropy(
        *("train", "recipe.yaml", "--data", "data", "--tokenizer", "hf", "--run", "run"),
        *("--", "--pretrained-checkpoint", "start"),
        *("--micro-batch-size", "2", "--global-batch-size", "2", "--train-iters", "1"),
        *("--eval-iters", "0", "--lr", "0", "--min-lr", "0", "--lr-warmup-iters", "0"),
        *("--weight-decay", "0"),
        cwd=folder,
    )
    return folder


def test_the_import_says_how_many_rows_there_are(folder):
    flags = yaml.safe_load((folder / "start" / "model.yaml").read_text())["model"]
    assert flags["vocab-size"] == ROWS


def test_the_first_loss_is_that_of_transformers_over_all_rows(folder):
    ids = [*(int(word[1:]) for word in WORDS), TOKENS - 1]
    network = LlamaForCausalLM.from_pretrained(folder / "hf", dtype=torch.float64).eval()
    with torch.no_grad():
        logits = network(torch.tensor([ids])).logits[0]
    target = torch.tensor([*ids[1:], ids[0]])
    over_all, over_tokens = (
        torch.nn.functional.cross_entropy(logits[:, :size], target).item()
        for size in (ROWS, TOKENS)
    )
    assert over_all - over_tokens > 0.05, "else this would show nothing"
    log = folder / "run" / "train.log"
    assert "leaked" not in log.read_text()  # as libraries say of what is never freed
    logged = read_log(log).training[1]["cross entropy"]
    assert logged == pytest.approx(over_all, rel=1e-5)


def test_the_export_has_every_row_and_is_scored_over_them(folder):
    infoentropy(
        *("convert", "run/checkpoints", "--tokenizer", "hf", "--output", "out", "--verify"),
        *("--data", "data/train/all"),
        cwd=folder,
    )
    before, after = (load_file(folder / name / "model.safetensors") for name in ("hf", "out"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    for model in ("out", "run/checkpoints"):
        infoentropy(
            *("evaluate", model, "--data", "data/train", "--output", f"{model}.evaluated"),
            *("--token-counts", "data/train/token_counts.npy"),
            cwd=folder,
        )
    found = [
        json.loads((folder / f"{model}.evaluated" / "evaluation.json").read_text())
        for model in ("out", "run/checkpoints")
    ]
    assert [each["model"]["vocab_size"] for each in found] == [ROWS, ROWS]
    nats = [each["total"]["nats_per_token"] for each in found]
    assert nats[0] == pytest.approx(nats[1], rel=1e-5)
