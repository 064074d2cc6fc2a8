"""What an evaluation refuses, by name, before or instead of scoring."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file, save_file
from tiny_llama import CONTEXT, score, write_model
from token_folder import VOCAB, random_documents, write_token_folder

from megatron_infoentropy.evaluate.evaluation import (
    load_evaluation,
)
from megatron_infoentropy.evaluate.model import hugging_face


@pytest.fixture(scope="module")
def saved(model, dataset, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    score(model, dataset, output=folder)
    return folder


def copy_of(folder: Path, place: Path) -> Path:
    place.mkdir()
    for path in folder.iterdir():
        (place / path.name).write_bytes(path.read_bytes())
    return place


def test_an_evaluation_is_read_back_as_it_was_saved(saved, tmp_path):
    loaded = load_evaluation(saved)
    names = sorted(path.name for path in saved.iterdir())
    assert names == ["evaluation.json", "evaluation.npz", "token_scores.npy"]
    assert loaded.save(tmp_path / "run") == tmp_path / "run" / "evaluation.json"
    again = load_evaluation(tmp_path / "run")
    assert again.summary == loaded.summary
    np.testing.assert_array_equal(again.documents.ce, loaded.documents.ce)
    np.testing.assert_array_equal(again.token_scores, loaded.token_scores)


@pytest.mark.parametrize("name", ["evaluation.npz", "token_scores.npy"])
def test_files_of_different_evaluations_are_refused(saved, other_model, dataset, tmp_path, name):
    other = tmp_path / "other"
    score(other_model, dataset, output=other)  # of the same tokens
    mixed = copy_of(saved, tmp_path / "mixed")
    (mixed / name).write_bytes((other / name).read_bytes())
    with pytest.raises(ValueError, match="different evaluations"):
        load_evaluation(mixed)
    (mixed / name).unlink()
    with pytest.raises(ValueError, match="no readable evaluation"):
        load_evaluation(mixed)


@pytest.mark.parametrize("text", ["[]", "null", '{"format": 2, "files": []}'])
def test_json_of_another_shape_is_refused(tmp_path, text):
    (tmp_path / "evaluation.json").write_text(text)
    with pytest.raises(ValueError, match="no readable evaluation"):
        load_evaluation(tmp_path)


def test_an_older_format_is_refused_with_what_to_do(saved, tmp_path):
    old = copy_of(saved, tmp_path / "old")
    summary = json.loads((old / "evaluation.json").read_text()) | {"format": 1}
    (old / "evaluation.json").write_text(json.dumps(summary))
    with pytest.raises(ValueError, match="format 1, expected 2; run `infoentropy eval"):
        load_evaluation(old)


def test_another_tokenizer_is_refused(dataset, tmp_path):
    folder = write_model(tmp_path / "model", seed=1)
    (folder / "tokenizer.json").write_bytes(b"{}")
    with pytest.raises(ValueError, match="preprocess the data with this tokenizer"):
        score(folder, dataset)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match=r"holds no tokenizer\.json"):
        score(folder, dataset)


def test_a_model_trained_on_data_of_another_tokenizer_is_refused(model, dataset):
    source = replace(hugging_face(model), trained_on="0" * 64)
    with pytest.raises(ValueError, match="trained on data of another tokenizer than"):
        score(source, dataset)


def test_a_smaller_vocabulary_is_refused(model, dataset, tmp_path):
    small = write_model(tmp_path / "model", seed=1, vocab_size=VOCAB - 1)
    with pytest.raises(ValueError, match=f"{VOCAB - 1}.*{VOCAB}"):
        score(small, dataset)
    counts = tmp_path / "counts.npy"
    np.save(counts, np.ones((2, VOCAB + 3), dtype=np.int64))
    with pytest.raises(ValueError, match="token counts of shape"):
        score(model, dataset, token_counts=counts)


def test_a_context_beyond_the_models_positions_is_refused(model, dataset):
    with pytest.raises(ValueError, match=f"{CONTEXT + 1} tokens.*{CONTEXT} positions"):
        score(model, dataset, context_length=CONTEXT + 1)
    with pytest.raises(ValueError, match="stride must be between 1 and the context length 8"):
        score(model, dataset, context_length=8, stride=9)


@pytest.mark.parametrize("documents", [[], [np.zeros(0, dtype=int)]])
def test_a_domain_without_tokens_is_refused_by_name(model, tmp_path, documents):
    domains = {"Web": random_documents(1, [4, 7]), "Law": documents}
    with pytest.raises(ValueError, match=r"domain 'Law' has \d documents and no"):
        score(model, write_token_folder(tmp_path / "barren", domains))


def test_a_model_that_gives_nan_is_refused_with_the_document_that_met_it(model, tmp_path):
    bad_model = copy_of(model, tmp_path / "model")
    weights = load_file(model / "model.safetensors")
    weights["model.embed_tokens.weight"][7, 0] = math.nan  # 0 x NaN: the whole document
    save_file(weights, bad_model / "model.safetensors", {"format": "pt"})
    fine, bad = np.array([1, 2, 3, 0]), np.array([4, 5, 7, 6, 0])
    data = write_token_folder(tmp_path / "data", {"Web": [fine, fine, bad, fine]})
    message = "5 of 17 tokens.*first token 0 of document 2 of domain 'Web'"
    with pytest.raises(ValueError, match=message):
        score(bad_model, data)


def test_a_diverged_model_is_scored_beyond_what_16_bits_hold(model, dataset, tmp_path):
    diverged = copy_of(model, tmp_path / "model")
    weights = load_file(model / "model.safetensors")
    weights["lm_head.weight"] *= 1e5
    save_file(weights, diverged / "model.safetensors", {"format": "pt"})
    evaluation = score(diverged, dataset)
    assert evaluation.summary["total"]["nats_per_token"] > 1e5
    assert evaluation.token_scores.max() == np.finfo(np.float16).max
    assert max(evaluation.summary["passage"]["ce"]) == 65504


def test_a_model_without_some_of_its_weights_is_refused(dataset, tmp_path):
    folder = write_model(tmp_path / "model", seed=1)
    config = json.loads((folder / "config.json").read_text()) | {"num_hidden_layers": 3}  # of 2
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"lack 9 tensors .* first model\.layers\.2\."):
        score(folder, dataset)


def test_a_folder_that_is_no_model_is_refused(dataset, tmp_path):
    with pytest.raises(ValueError, match="a Hugging Face model folder or a Megatron"):
        score(tmp_path, dataset)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ("pile", "must be auto, scored, paper or a .json file"),
        ("paper", "a number for each of \\['Code', 'Prose <b>'\\]"),
        ('{"Code": 1}', "a number for each of"),
        ('{"Code": 0, "Prose <b>": 0}', "not all 0"),
        ('{"Code": NaN, "Prose <b>": 1}', "a weight from 0 to 1e30 for 'Code', got nan"),
        ('{"Code": 1e308, "Prose <b>": 1e308}', "a weight from 0 to 1e30 for"),
        ("[1, 2", "no readable domain weights"),
    ],
)
def test_domain_weights_that_do_not_fit_are_refused(model, dataset, tmp_path, weights, message):
    if weights[0] in "{[":
        (tmp_path / "weights.json").write_text(weights)
        weights = str(tmp_path / "weights.json")
    with pytest.raises(ValueError, match=message):
        score(model, dataset, domain_weights=weights)


def test_domain_weights_are_taken_from_a_file(model, dataset, tmp_path):
    (tmp_path / "weights.json").write_text('{"Code": 3, "Prose <b>": 1, "Other": 9}')
    summary = score(model, dataset, domain_weights=str(tmp_path / "weights.json")).summary
    nats = {name: numbers["nats_per_token"] for name, numbers in summary["domains"].items()}
    expected = 0.75 * nats["Code"] + 0.25 * nats["Prose <b>"]
    assert summary["weighted_average"]["nats_per_token"] == pytest.approx(expected)
