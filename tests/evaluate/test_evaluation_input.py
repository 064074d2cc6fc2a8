"""What an evaluation refuses, by name, before or instead of scoring."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file, save_file
from tiny_llama import CONTEXT, score, write_model
from token_folder import VOCAB, random_documents, write_token_folder

from megatron_infoentropy.evaluate.evaluation import load_evaluation
from megatron_infoentropy.evaluate.model import hugging_face


@pytest.fixture(scope="module")
def saved(model, other_model, dataset, tmp_path_factory) -> Path:
    """An evaluation; and beside it `other`, of the same tokens."""
    folder = tmp_path_factory.mktemp("saved") / "run"
    score(model, dataset, output=folder)
    score(other_model, dataset, output=folder.with_name("other"))
    return folder


def test_an_evaluation_is_read_back_as_it_was_saved(saved, tmp_path):
    loaded = load_evaluation(saved)
    names = sorted(path.name for path in saved.iterdir())
    assert names == ["evaluation.json", "evaluation.npz", "token_scores.npy"]
    assert loaded.save(tmp_path / "run") == tmp_path / "run" / "evaluation.json"
    again = load_evaluation(tmp_path / "run")
    assert again.summary == loaded.summary
    np.testing.assert_array_equal(again.documents.ce, loaded.documents.ce)
    np.testing.assert_array_equal(again.token_scores, loaded.token_scores)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("evaluation.npz", "of the other", "different evaluations"),
        ("token_scores.npy", "of the other", "different evaluations"),
        ("evaluation.npz", None, "no readable evaluation"),
        ("token_scores.npy", None, "no readable evaluation"),
        ("evaluation.json", "[]", "no readable evaluation"),
        ("evaluation.json", "null", "no readable evaluation"),
        ("evaluation.json", '{"format": 2, "files": []}', "no readable evaluation"),
        ("evaluation.json", '{"format": 1}', "format 1, expected 2; run `infoentropy eval"),
    ],
)
def test_files_that_are_not_those_of_one_evaluation_are_refused(
    saved, tmp_path, name, content, message
):
    mixed = shutil.copytree(saved, tmp_path / "mixed")
    (mixed / name).unlink()
    if content == "of the other":
        shutil.copy(saved.with_name("other") / name, mixed)
    elif content:
        (mixed / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        load_evaluation(mixed)


def add_a_layer(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text()) | {"num_hidden_layers": 3}  # of 2
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: (folder / "tokenizer.json").write_bytes(b"{}"),
         "preprocess the data with this tokenizer"),
        (lambda folder: (folder / "tokenizer.json").unlink(), r"holds no tokenizer\.json"),
        (lambda folder: (folder / "config.json").unlink(),
         "a Hugging Face model folder or a Megatron"),
        (add_a_layer, r"lack 9 tensors .* first model\.layers\.2\."),
        (lambda folder: write_model(folder, seed=1, vocab_size=VOCAB - 1), f"{VOCAB - 1}.*{VOCAB}"),
    ],
    ids=["another tokenizer", "no tokenizer", "no model", "lost weights", "smaller vocabulary"],
)  # fmt: skip
def test_a_model_that_does_not_fit_is_refused(model, dataset, tmp_path, change, message):
    folder = shutil.copytree(model, tmp_path / "model")
    change(folder)
    with pytest.raises(ValueError, match=message):
        score(folder, dataset)


def test_a_model_trained_on_data_of_another_tokenizer_is_refused(model, dataset):
    source = replace(hugging_face(model), trained_on="0" * 64)
    with pytest.raises(ValueError, match="trained on data of another tokenizer than"):
        score(source, dataset)


def test_counts_of_another_vocabulary_are_refused(model, dataset, tmp_path):
    np.save(tmp_path / "counts.npy", np.ones((2, VOCAB + 3), dtype=np.int64))
    with pytest.raises(ValueError, match="token counts of shape"):
        score(model, dataset, token_counts=tmp_path / "counts.npy")


@pytest.mark.parametrize("documents", [[], [np.zeros(0, dtype=int)]])
def test_a_domain_without_tokens_is_refused_by_name(model, tmp_path, documents):
    domains = {"Web": random_documents(1, [4, 7]), "Law": documents}
    with pytest.raises(ValueError, match=r"domain 'Law' has \d documents and no"):
        score(model, write_token_folder(tmp_path / "barren", domains))


def test_a_model_that_gives_nan_is_refused_with_the_document_that_met_it(model, tmp_path):
    bad_model = shutil.copytree(model, tmp_path / "model")
    weights = load_file(model / "model.safetensors")
    weights["model.embed_tokens.weight"][7, 0] = math.nan  # 0 x NaN: the whole document
    save_file(weights, bad_model / "model.safetensors", {"format": "pt"})
    fine, bad = np.array([1, 2, 3, 0]), np.array([4, 5, 7, 6, 0])
    data = write_token_folder(tmp_path / "data", {"Web": [fine, fine, bad, fine]})
    message = "5 of 17 tokens.*first token 0 of document 2 of domain 'Web'"
    with pytest.raises(ValueError, match=message):
        score(bad_model, data)


def test_a_diverged_model_is_scored_beyond_what_16_bits_hold(model, dataset, tmp_path):
    diverged = shutil.copytree(model, tmp_path / "model")
    weights = load_file(model / "model.safetensors")
    weights["lm_head.weight"] *= 1e5
    save_file(weights, diverged / "model.safetensors", {"format": "pt"})
    evaluation = score(diverged, dataset)
    assert evaluation.summary["total"]["nats_per_token"] > 1e5
    assert evaluation.token_scores.max() == np.finfo(np.float16).max
    assert max(evaluation.summary["passage"]["ce"]) == 65504


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"context_length": CONTEXT + 1}, f"{CONTEXT + 1} tokens.*{CONTEXT} positions"),
        ({"context_length": 0}, "context_length must be at least 1, got 0"),
        ({"context_length": 8, "stride": 9}, "stride must be between 1 and the context length 8"),
        ({"batch_tokens": 0}, "batch_tokens must be at least 1, got 0"),
        ({"max_tokens": 1}, "at least one token for each of the 2 domains, got 1"),
        ({"dtype": "int3"}, "dtype must be one of float32, bfloat16, float16, got 'int3'"),
        ({"domain_weights": "pile"}, "must be auto, scored, paper or a .json file"),
        ({"domain_weights": "paper"}, "a number for each of \\['Code', 'Prose <b>'\\]"),
    ],
    ids=str,
)
def test_options_that_do_not_fit_are_refused(model, dataset, options, message):
    with pytest.raises(ValueError, match=message):
        score(model, dataset, **options)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ('{"Code": 1}', "a number for each of"),
        ('{"Code": 0, "Prose <b>": 0}', "not all 0"),
        ('{"Code": NaN, "Prose <b>": 1}', "a weight from 0 to 1e30 for 'Code', got nan"),
        ('{"Code": 1e308, "Prose <b>": 1e308}', "a weight from 0 to 1e30 for"),
        ("[1, 2", "no readable domain weights"),
    ],
)
def test_a_file_of_domain_weights_that_do_not_fit_is_refused(
    model, dataset, tmp_path, weights, message
):
    (tmp_path / "weights.json").write_text(weights)
    with pytest.raises(ValueError, match=message):
        score(model, dataset, domain_weights=str(tmp_path / "weights.json"))


def test_domain_weights_are_taken_from_a_file(model, dataset, tmp_path):
    (tmp_path / "weights.json").write_text('{"Code": 3, "Prose <b>": 1, "Other": 9}')
    summary = score(model, dataset, domain_weights=str(tmp_path / "weights.json")).summary
    nats = {name: numbers["nats_per_token"] for name, numbers in summary["domains"].items()}
    expected = 0.75 * nats["Code"] + 0.25 * nats["Prose <b>"]
    assert summary["weighted_average"]["nats_per_token"] == pytest.approx(expected)
