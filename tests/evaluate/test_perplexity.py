"""Scoring a model, against an independent float64 computation."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_llama import CONTEXT, score, write_model
from token_folder import EOD, VOCAB, random_documents, write_token_folder
from transformers import LlamaForCausalLM

from megatron_infoentropy.evaluate.evaluation import Evaluation
from megatron_infoentropy.evaluate.scoring import batches_of_similar_length, cut_windows
from megatron_infoentropy.evaluate.tally import BANDS, frequency_bands

LN2 = math.log(2)


@pytest.fixture(scope="module")
def whole(model, dataset) -> Evaluation:
    return score(model, dataset)


@pytest.fixture(scope="module")
def network(model):
    return LlamaForCausalLM.from_pretrained(model, dtype=torch.float64).eval()


@pytest.fixture(scope="module")
def expected(network, dataset) -> np.ndarray:
    return expected_scores(network, dataset, CONTEXT, CONTEXT, packed=False)


def read_documents(dataset: Path) -> dict[str, list[np.ndarray]]:
    """The dataset's documents, split at end-of-document: a reader that knows no index."""
    domains = {}
    for name, entry in json.loads((dataset / "manifest.json").read_text())["domains"].items():
        tokens = np.fromfile(dataset / f"{entry['prefix']}.bin", dtype="<u2").astype(int)
        ends = np.flatnonzero(tokens == EOD) + 1
        domains[name] = np.split(tokens, ends)[:-1]
    return domains


def float64_log_p(network, text, context: int, stride: int, start=(EOD,)) -> np.ndarray:
    """Log-probabilities [tokens, vocabulary] of a text behind `start`, one window at a time."""
    tokens, rows, first = [*start, *text], [], 0
    while first < len(text):
        last = min(first + (stride if first else context - len(start) + 1), len(text))
        begin = max(len(start) + first - (context - stride + 1), 0) if first else 0
        read = torch.tensor([tokens[begin : len(start) + last - 1]])
        with torch.no_grad():
            rows.append(torch.log_softmax(network(read).logits[0], dim=-1)[first - last :])
        first = last
    return torch.cat(rows).numpy()


def expected_scores(network, dataset: Path, context: int, stride: int, packed: bool):
    """Domain, document, token, cross entropy, entropy, confidence, right: a row per token."""
    rows = []
    for index, documents in enumerate(read_documents(dataset).values()):
        texts = [np.concatenate(documents)] if packed else documents
        log_p = np.concatenate([float64_log_p(network, t, context, stride) for t in texts])
        tokens = np.concatenate(documents)
        number = np.repeat(np.arange(len(documents)), [len(d) for d in documents])
        p = np.exp(log_p)
        columns = (
            np.full(len(tokens), index),
            number,
            tokens,
            -log_p[np.arange(len(tokens)), tokens],
            -(p * log_p).sum(axis=1),
            p.max(axis=1),
            log_p.argmax(axis=1) == tokens,
        )
        rows.append(np.stack(columns, axis=1))
    return np.concatenate(rows)


@pytest.mark.parametrize(
    "options",
    [
        {"batch_tokens": 1},
        {"batch_tokens": 50},
        {"stride": 4},
        {"context_length": 7, "stride": 3, "batch_tokens": 30},
        {"packed": True},
        {"packed": True, "stride": 11},
    ],
    ids=str,
)
def test_scores_equal_an_independent_float64_computation(model, network, dataset, options):
    if options.get("packed"):
        options = options | {"batch_tokens": 4096}  # a chunk, in which packing happens, a domain
    evaluation = score(model, dataset, **options)
    context = options.get("context_length", CONTEXT)
    stride = options.get("stride", context)
    expected = expected_scores(network, dataset, context, stride, options.get("packed", False))
    band = frequency_bands(np.load(dataset / "token_counts.npy").sum(axis=0))
    domain, document, _ = expected[:, :3].astype(int).T
    for row, place in enumerate(
        zip(evaluation.documents.domain, evaluation.documents.document, strict=True)
    ):
        mine = expected[(domain == place[0]) & (document == place[1])]
        bands = band[mine[:, 2].astype(int)]
        for column, sums in ((3, evaluation.documents.ce), (4, evaluation.documents.entropy)):
            sums_by_band = np.bincount(bands, weights=mine[:, column], minlength=BANDS)
            np.testing.assert_allclose(sums[row], sums_by_band, atol=2e-4)
        counts = np.bincount(bands, minlength=BANDS)
        np.testing.assert_array_equal(evaluation.documents.tokens[row], counts)
    np.testing.assert_allclose(evaluation.token_scores, expected[:, 3:5], rtol=1e-3, atol=1e-4)
    assert evaluation.summary["total"]["tokens"] == len(expected)
    scoring = evaluation.summary["scoring"]
    assert (scoring["context_length"], scoring["stride"]) == (context, stride)
    assert scoring["mode"] == ("packed" if options.get("packed") else "sliding")


def test_the_summary_follows_from_the_scores_of_the_tokens(whole, expected):
    domain, ce, summary = expected[:, 0], expected[:, 3], whole.summary
    total = summary["total"]
    assert total["nats_per_token"] == pytest.approx(ce.mean(), rel=1e-5)
    assert total["perplexity"] == pytest.approx(math.exp(ce.mean()), rel=1e-5)
    assert total["bits_per_byte"] == pytest.approx(ce.mean() / LN2 / 3, rel=1e-5)
    nats = [ce[domain == index].mean() for index in range(2)]
    sizes = [(domain == index).sum() for index in range(2)]
    for mean, numbers in zip(nats, summary["domains"].values(), strict=True):
        assert numbers["nats_per_token"] == pytest.approx(mean, rel=1e-5)
        assert numbers["bits_per_byte"] == pytest.approx(mean / LN2 / 3, rel=1e-5)
    assert summary["uniform_average"]["nats_per_token"] == pytest.approx(np.mean(nats), rel=1e-5)
    assert summary["worst_case"]["nats_per_token"] == pytest.approx(max(nats), rel=1e-5)
    assert summary["worst_case"]["domain"] == ["Prose <b>", "Code"][int(np.argmax(nats))]
    weighted = summary["weighted_average"]  # the counts are this very dataset's
    assert weighted["weights_are"] == "tokens of the training data"
    assert list(weighted["weights"].values()) == pytest.approx(np.array(sizes) / sum(sizes))
    assert weighted["nats_per_token"] == pytest.approx(ce.mean(), rel=1e-5)
    for names in ("buckets", "deciles"):
        assert sum(numbers["tokens"] for numbers in summary[names].values()) == len(ce)


def test_calibration_is_that_of_the_most_probable_token(whole, expected):
    confidence, right = expected[:, 5], expected[:, 6]
    found = whole.summary["calibration"]
    assert found["accuracy"] == pytest.approx(right.mean())
    assert found["mean_confidence"] == pytest.approx(confidence.mean(), rel=1e-5)
    place = np.minimum((confidence * 20).astype(int), 19)
    gaps = [abs((confidence - right)[place == b].sum()) for b in range(20)]
    assert found["expected_error"] == pytest.approx(sum(gaps) / len(right), rel=1e-4)
    assert sum(found["tokens"]) == len(right)


def test_difficulty_cuts_the_tokens_into_thirds_by_the_models_own_entropy(whole, expected):
    entropy = expected[:, 4]
    order = np.argsort(entropy)
    thirds = whole.summary["difficulty"]["buckets"]
    assert list(thirds) == ["easy", "medium", "hard"]
    for numbers, tokens in zip(thirds.values(), np.array_split(order, 3), strict=True):
        assert numbers["tokens"] == pytest.approx(len(order) / 3, abs=8)  # ties: first windows
        assert numbers["mean_entropy"] == pytest.approx(entropy[tokens].mean(), abs=0.05)
        assert numbers["entropy_from"] <= numbers["mean_entropy"] <= numbers["entropy_to"]


def test_the_entropy_histogram_has_the_means_of_64_bins_up_to_the_largest_entropy(whole, expected):
    histogram = whole.summary["entropy_histogram"]
    edges = np.linspace(0, math.log(VOCAB), 65)
    assert histogram["edges"] == pytest.approx(edges)
    place = np.searchsorted(edges[1:-1], expected[:, 4], side="right")
    assert histogram["tokens"] == np.bincount(place, minlength=64).tolist()
    for name, column in (("mean_ce", 3), ("mean_entropy", 4)):
        for bin_, mean in enumerate(histogram[name]):
            inside = expected[place == bin_, column]
            mine = pytest.approx(inside.mean(), abs=1e-5) if len(inside) else None
            assert mean == mine


def test_the_passage_is_readable_and_scored(whole, dataset):
    found = whole.summary["passage"]
    document = read_documents(dataset)[found["domain"]][found["document"]]
    assert len(document) == len(found["text"]) == 64  # the longest
    assert "".join(found["text"]).split("<|endoftext|>")[0].split() == [
        f"w{token}" for token in document[:-1]
    ]
    offset = len(np.concatenate(read_documents(dataset)["Prose <b>"]))
    assert found["ce"] == pytest.approx(whole.token_scores[offset : offset + 64, 0], abs=1e-3)


def test_a_sample_takes_the_same_tokens_each_time_and_claims_no_bits_per_byte(
    model, dataset, whole
):
    first = score(model, dataset, max_tokens=100)
    again = score(model, dataset, max_tokens=100)
    assert 98 <= first.summary["total"]["tokens"] <= 100
    assert first.fingerprint == again.fingerprint != whole.fingerprint
    assert not first.summary["data"]["complete"]
    assert whole.summary["data"]["complete"]
    assert {d["bits_per_byte"] for d in first.summary["domains"].values()} == {None}
    assert first.summary["total"]["bits_per_byte"] is None
    share = first.summary["domains"]["Code"]["tokens"] / first.summary["total"]["tokens"]
    full = whole.summary["domains"]["Code"]["tokens"] / whole.summary["total"]["tokens"]
    assert share == pytest.approx(full, abs=0.02)


def test_the_fingerprint_is_of_the_tokens_not_of_how_they_were_batched(model, dataset, whole):
    assert score(model, dataset, batch_tokens=20).fingerprint == whole.fingerprint


def test_lower_precision_is_scored_in_fp32_and_says_so(model, dataset, whole):
    low = score(model, dataset, dtype="bfloat16")
    assert low.summary["model"]["dtype"] == "bfloat16"
    nats = whole.summary["total"]["nats_per_token"]
    assert low.summary["total"]["nats_per_token"] == pytest.approx(nats, rel=2e-2)
    assert low.summary["total"]["nats_per_token"] != nats


def test_documents_without_tokens_are_left_out_and_shift_nothing(model, tmp_path):
    first, second = random_documents(1, [1, 20])
    empty = np.zeros(0, dtype=int)
    hollow = write_token_folder(tmp_path / "hollow", {"Web": [empty, first, empty, second, empty]})
    plain = write_token_folder(tmp_path / "plain", {"Web": [first, second]})
    with_empty, without = score(model, hollow), score(model, plain)
    assert with_empty.documents.document.tolist() == [1, 3]
    np.testing.assert_array_equal(with_empty.documents.ce, without.documents.ce)
    data = with_empty.summary["data"]
    assert data["complete"]
    assert (data["documents"], data["empty_documents"], data["one_token_documents"]) == (2, 3, 1)


@pytest.mark.parametrize("start", [[5], [5, 7, 9]])
@pytest.mark.parametrize("stride", [CONTEXT, 5, 1])
def test_a_start_token_is_context_and_is_not_scored(model, network, tmp_path, start, stride):
    """As everybody measures models that know <s> text, and not </s> <s> text."""
    texts = [d.tolist() for d in random_documents(8, [3, 14, 16, 17, 40, 1])]
    written = [np.array([*start, *text]) for text in [*texts, []]]
    data = write_token_folder(tmp_path / "data", {"Web": written}, start_ids=start)
    found = score(model, data, stride=stride)
    log_p = [float64_log_p(network, text, CONTEXT, stride, start) for text in texts]
    expected = [
        -rows[range(len(text)), text].sum() for rows, text in zip(log_p, texts, strict=True)
    ]
    total = found.summary["total"]
    assert total["tokens"] == sum(map(len, texts))
    assert total["nats_per_token"] == pytest.approx(sum(expected) / total["tokens"], abs=1e-6)
    np.testing.assert_allclose(found.documents.ce.sum(axis=1), expected, rtol=1e-5)
    assert "behind its start token, which is not scored" in found.summary["scoring"]["rule"]
    packed = score(model, data, packed=True)  # as in training: behind the document before
    assert packed.summary["total"]["tokens"] == sum(map(len, written))


def test_a_model_with_more_rows_than_tokens_is_scored_over_all_of_them(dataset, tmp_path):
    """Every Qwen and Pythia: the rows are part of the softmax, and of the largest entropy."""
    folder = write_model(tmp_path / "model", seed=1, vocab_size=VOCAB + 30)
    network = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    expected = expected_scores(network, dataset, CONTEXT, CONTEXT, packed=False)
    summary = score(folder, dataset).summary
    assert summary["total"]["nats_per_token"] == pytest.approx(expected[:, 3].mean(), abs=1e-6)
    assert summary["model"]["vocab_size"] == VOCAB + 30
    assert summary["entropy_histogram"]["edges"][-1] == pytest.approx(math.log(VOCAB + 30))


def test_batches_hold_every_window_longest_first_and_stay_within_the_budget():
    windows = cut_windows(range(1, 60), 16, 12)
    batches = list(batches_of_similar_length(windows, 40))
    assert sorted(window.first for batch in batches for window in batch) == sorted(
        window.first for window in windows
    )
    assert all(len(batch) * batch[0].positions <= 40 for batch in batches)
    longest_first = [window.positions for batch in batches for window in batch]
    assert longest_first == sorted(longest_first, reverse=True)
