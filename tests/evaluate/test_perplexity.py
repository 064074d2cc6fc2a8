"""Scoring a model: against an independent float64 computation, and what is refused."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import CONTEXT, write_model
from token_folder import EOD, VOCAB, random_documents, write_token_folder
from transformers import LlamaForCausalLM

from megatron_infoentropy.evaluate.buckets import frequency_bands
from megatron_infoentropy.evaluate.errors import (
    EmptyDomainError,
    EvaluationFormatError,
    ModelFolderError,
    NonFiniteScoreError,
    TokenizerMismatchError,
    VocabularyMismatchError,
)
from megatron_infoentropy.evaluate.evaluation import load_evaluation
from megatron_infoentropy.evaluate.perplexity import evaluate_model
from megatron_infoentropy.evaluate.windows import (
    batches_of_similar_length,
    cut_windows,
    padded_batch,
)


def evaluate(model: Path, dataset: Path, **options):
    return evaluate_model(
        model, dataset, token_counts=dataset / "token_counts.npy", device="cpu", **options
    )


def read_documents(dataset: Path) -> dict[str, list[np.ndarray]]:
    """The dataset's documents, split at end-of-document: a reader that knows no index."""
    domains = {}
    for name, entry in json.loads((dataset / "manifest.json").read_text())["domains"].items():
        tokens = np.fromfile(dataset / f"{entry['prefix']}.bin", dtype="<u2").astype(int)
        ends = np.flatnonzero(tokens == EOD) + 1
        domains[name] = np.split(tokens, ends)[:-1]
    return domains


def float64_scores(model: Path, document: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Cross entropy and entropy of every token of one document, one window at a time."""
    network = LlamaForCausalLM.from_pretrained(model, dtype=torch.float64).eval()
    ce, entropy = [], []
    for start in range(0, len(document), CONTEXT):
        target = torch.tensor(document[start : start + CONTEXT])
        before = EOD if start == 0 else int(document[start - 1])
        inputs = torch.tensor([[before, *target[:-1].tolist()]])
        with torch.no_grad():
            log_p = torch.log_softmax(network(inputs).logits[0], dim=-1)
        ce.append(-log_p[torch.arange(len(target)), target])
        entropy.append(-(log_p.exp() * log_p).sum(-1))
    return torch.cat(ce).numpy(), torch.cat(entropy).numpy()


@pytest.mark.parametrize("batch_tokens", [1, 50, 4096])
def test_scores_equal_an_independent_float64_computation(model, dataset, batch_tokens):
    evaluation = evaluate(model, dataset, batch_tokens=batch_tokens)
    counts = np.load(dataset / "token_counts.npy").sum(axis=0)
    band = frequency_bands(counts)
    expected = {
        name: [(tokens, *float64_scores(model, tokens)) for tokens in documents]
        for name, documents in read_documents(dataset).items()
    }
    row = 0
    for index, documents in enumerate(expected.values()):
        for number, (tokens, ce, entropy) in enumerate(documents):
            place = evaluation.documents.domain[row], evaluation.documents.document[row]
            assert place == (index, number)
            for b in range(20):
                inside = band[tokens] == b
                assert evaluation.documents.tokens[row, b] == inside.sum()
                assert evaluation.documents.ce[row, b] == pytest.approx(ce[inside].sum(), abs=2e-4)
                assert evaluation.documents.entropy[row, b] == pytest.approx(
                    entropy[inside].sum(), abs=2e-4
                )
            row += 1
    assert row == len(evaluation.documents.tokens)
    every = np.concatenate([ce for documents in expected.values() for _, ce, _ in documents])
    total = evaluation.summary["total"]
    assert total["tokens"] == len(every)
    assert total["nats_per_token"] == pytest.approx(every.mean(), rel=1e-5)
    assert total["perplexity"] == pytest.approx(math.exp(every.mean()), rel=1e-5)
    for name, documents in expected.items():
        nats = sum(ce.sum() for _, ce, _ in documents)
        numbers = evaluation.summary["domains"][name]
        byte_count = 3 * sum(len(tokens) for tokens, _, _ in documents)
        assert numbers["bits_per_byte"] == pytest.approx(nats / math.log(2) / byte_count, rel=1e-5)
    uniform = np.mean([d["nats_per_token"] for d in evaluation.summary["domains"].values()])
    assert evaluation.summary["uniform_average"]["nats_per_token"] == pytest.approx(uniform)


def test_every_token_is_predicted_once_with_one_token_of_context():
    lengths = np.array([1, 15, 16, 17, 33, 64])
    windows = cut_windows(lengths, 16)
    seen = [np.zeros(length, dtype=int) for length in lengths]
    for document, start, length in zip(
        windows.document, windows.start, windows.length, strict=True
    ):
        assert 1 <= length <= 16
        seen[document][start : start + length] += 1
    assert all((times == 1).all() for times in seen)
    assert len(windows) == 1 + 1 + 1 + 2 + 3 + 4


def test_batches_hold_every_window_and_stay_within_the_budget():
    windows = cut_windows(np.arange(1, 60), 16)
    batches = list(batches_of_similar_length(windows, 40))
    assert sorted(np.concatenate(batches)) == list(range(len(windows)))
    assert all(len(batch) * windows.length[batch].max() <= 40 for batch in batches)
    assert windows.length[batches[0][0]] == 16


def test_padding_stands_right_and_is_never_a_target():
    inputs, target = padded_batch([np.array([9, 1, 2, 3]), np.array([8, 7])], padding_id=5)
    assert inputs.tolist() == [[9, 1, 2], [8, 5, 5]]
    assert target.tolist() == [[1, 2, 3], [7, -100, -100]]


def test_the_entropy_histogram_holds_every_token(model, dataset):
    summary = evaluate(model, dataset).summary
    histogram = summary["entropy_histogram"]
    tokens = np.array(histogram["tokens"])
    filled = tokens > 0
    assert tokens.sum() == summary["total"]["tokens"]
    assert histogram["edges"][0] == 0
    assert histogram["edges"][-1] == pytest.approx(math.log(VOCAB))
    for name, total in (("mean_ce", "nats_per_token"), ("mean_entropy", "mean_entropy")):
        values = np.array(histogram[name], dtype=float)
        mean = (values[filled] * tokens[filled]).sum() / tokens.sum()
        assert mean == pytest.approx(summary["total"][total])
    entropy = np.array(histogram["mean_entropy"], dtype=float)[filled]
    assert (entropy >= np.array(histogram["edges"])[:-1][filled]).all()
    assert (entropy <= np.array(histogram["edges"])[1:][filled]).all()


def test_a_sample_takes_the_same_tokens_each_time_and_claims_no_bits_per_byte(model, dataset):
    first = evaluate(model, dataset, max_tokens=100)
    again = evaluate(model, dataset, max_tokens=100)
    whole = evaluate(model, dataset)
    assert 98 <= first.summary["total"]["tokens"] <= 100
    assert first.fingerprint == again.fingerprint != whole.fingerprint
    assert not first.summary["data"]["complete"]
    assert whole.summary["data"]["complete"]
    assert {d["bits_per_byte"] for d in first.summary["domains"].values()} == {None}
    share = first.summary["domains"]["Code"]["tokens"] / first.summary["total"]["tokens"]
    full = whole.summary["domains"]["Code"]["tokens"] / whole.summary["total"]["tokens"]
    assert share == pytest.approx(full, abs=0.02)


def test_an_evaluation_is_read_back_as_it_was_saved(model, dataset, tmp_path):
    saved = evaluate(model, dataset)
    assert saved.save(tmp_path / "run") == tmp_path / "run" / "evaluation.json"
    loaded = load_evaluation(tmp_path / "run")
    assert loaded.summary == saved.summary | {"files": loaded.summary["files"]}
    np.testing.assert_array_equal(loaded.documents.ce, saved.documents.ce)
    names = sorted(path.name for path in (tmp_path / "run").iterdir())
    assert names == ["evaluation.json", "evaluation.npz"]


def test_files_of_different_evaluations_are_refused(model, dataset, tmp_path):
    evaluate(model, dataset).save(tmp_path / "a")
    evaluate(model, dataset, max_tokens=60).save(tmp_path / "b")
    (tmp_path / "a" / "evaluation.npz").replace(tmp_path / "b" / "evaluation.npz")
    with pytest.raises(EvaluationFormatError, match="different evaluations"):
        load_evaluation(tmp_path / "b")
    with pytest.raises(EvaluationFormatError, match="no readable evaluation"):
        load_evaluation(tmp_path / "a")


def test_another_tokenizer_is_refused(dataset, tmp_path):
    folder = write_model(tmp_path / "model", seed=1)
    (folder / "tokenizer.json").write_bytes(b"{}")
    with pytest.raises(TokenizerMismatchError, match="preprocess the data with this tokenizer"):
        evaluate(folder, dataset)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(TokenizerMismatchError, match="no such file"):
        evaluate(folder, dataset)


def test_another_vocabulary_size_is_refused(model, dataset, tmp_path):
    padded = write_model(tmp_path / "model", seed=1, vocab_size=VOCAB + 3)
    with pytest.raises(VocabularyMismatchError, match=f"{VOCAB + 3}.*{VOCAB}"):
        evaluate(padded, dataset)
    counts = tmp_path / "counts.npy"
    np.save(counts, np.ones((2, VOCAB + 3), dtype=np.int64))
    with pytest.raises(VocabularyMismatchError, match="token counts of shape"):
        evaluate_model(model, dataset, token_counts=counts, device="cpu")


def test_documents_without_tokens_are_left_out_and_shift_nothing(model, tmp_path):
    first, second = random_documents(1, [4, 20])
    empty = np.zeros(0, dtype=int)
    hollow = write_token_folder(tmp_path / "hollow", {"Web": [empty, first, empty, second, empty]})
    plain = write_token_folder(tmp_path / "plain", {"Web": [first, second]})
    with_empty, without = evaluate(model, hollow), evaluate(model, plain)
    assert with_empty.documents.document.tolist() == [1, 3]
    np.testing.assert_array_equal(with_empty.documents.ce, without.documents.ce)
    assert with_empty.summary["data"]["complete"]


@pytest.mark.parametrize("documents", [[], [np.zeros(0, dtype=int)]])
def test_a_domain_without_tokens_is_refused_by_name(model, tmp_path, documents):
    domains = {"Web": random_documents(1, [4, 7]), "Law": documents}
    with pytest.raises(EmptyDomainError, match=r"domain 'Law' has \d documents and no"):
        evaluate(model, write_token_folder(tmp_path / "barren", domains))


def test_a_model_that_gives_nan_is_refused(model, dataset, tmp_path):
    network = LlamaForCausalLM.from_pretrained(model)
    with torch.no_grad():
        network.lm_head.weight[3, 0] = math.nan
    network.save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "tokenizer.json").write_bytes((model / "tokenizer.json").read_bytes())
    with pytest.raises(NonFiniteScoreError, match="domain 'Prose"):
        evaluate(tmp_path / "model", dataset)


def test_a_folder_that_is_no_model_is_refused(dataset, tmp_path):
    with pytest.raises(ModelFolderError, match="infoentropy convert"):
        evaluate(tmp_path, dataset)
