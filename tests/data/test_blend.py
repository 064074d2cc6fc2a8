"""Weights of domains: what Megatron reads, and how often a run goes through each domain."""

import json
from pathlib import Path

import pytest

from megatron_infoentropy.data.blend import PAPER_WEIGHTS, blend, data_path
from megatron_infoentropy.data.manifest import DomainFacts, Manifest, Span, TokenizerFacts


def dataset(folder: Path, sizes: dict[str, int]) -> Path:
    folder.mkdir()
    domains = {
        name: DomainFacts(name.lower(), 1, size, size, bin_spans=[Span(2 * size, "")])
        for name, size in sizes.items()
    }
    Manifest(
        folder=folder,
        tokenizer=TokenizerFacts("0" * 64, 300, 0),
        dtype="uint16",
        append_eod=True,
        domains=domains,
    ).save()
    return folder


def weights_of(folder: Path, kind: str) -> dict[str, float]:
    return {share.domain: share.weight for share in blend(folder, kind)}


@pytest.fixture
def two(tmp_path):
    return dataset(tmp_path / "data", {"A": 900, "B": 100})


def test_a_domain_of_a_shard_without_a_token_gets_no_weight(tmp_path):
    shard = dataset(tmp_path / "data", {"ArXiv": 900, "Books3": 0})
    assert weights_of(shard, "natural") == weights_of(shard, "temperature:2") == {"ArXiv": 1.0}
    with pytest.raises(ValueError, match=r"'Books3' of .*has no token, .*merge the shards first"):
        blend(shard, "paper")


def test_natural_weights_use_every_token_equally_often(two):
    assert weights_of(two, "natural") == {"A": 0.9, "B": 0.1}
    assert {share.epochs(2000) for share in blend(two)} == {2.0}


def test_temperature_raises_the_small_domain(two):
    assert weights_of(two, "temperature:1") == pytest.approx({"A": 0.9, "B": 0.1})
    assert weights_of(two, "temperature:2") == pytest.approx({"A": 0.75, "B": 0.25})
    assert weights_of(two, "temperature:1e300") == pytest.approx({"A": 0.5, "B": 0.5})
    shares = {share.domain: share.epochs(1000) for share in blend(two, "temperature:2")}
    assert shares == pytest.approx({"A": 0.75 / 0.9, "B": 2.5})


def test_user_weights_are_scaled_and_zero_leaves_out(two, tmp_path):
    path = tmp_path / "w.json"
    path.write_text(json.dumps({"A": 1, "B": 3}))
    assert weights_of(two, str(path)) == {"B": 0.75, "A": 0.25}
    path.write_text(json.dumps({"A": 0, "B": 3}))
    assert weights_of(two, str(path)) == {"B": 1.0}
    for scale in (1e30, 5e-324):
        path.write_text(json.dumps({"A": scale, "B": scale}))
        assert weights_of(two, str(path)) == {"A": 0.5, "B": 0.5}


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ("even", "must be natural, paper, temperature:T or a .json file, got 'even'"),
        ("temperature:0", "a number above 0, got '0'"),
        ("temperature:x", "a number above 0, got 'x'"),
        ("temperature:nan", "a number above 0, got 'nan'"),
        ("temperature:inf", "a number above 0, got 'inf'"),
        ("temperature:1e-9", "at temperature 1e-9 the domain 'B' would get no token"),
        ("temperature:5e-324", "at temperature 5e-324 the domain 'B' would get no token"),
        ("gone.json", "no such file of weights"),
        ("paper", "do not name the domain 'A'"),
        # the content of a file
        ('{"A": 1}', "do not name the domain 'B'"),
        ('{"A": 1, "B": 1, "C": 1}', "weighs 'C', which the dataset does not have"),
        ('{"A": -1, "B": 1}', "a weight from 0 to 1e30 for 'A', got -1"),
        ('{"A": NaN, "B": 1}', "a weight from 0 to 1e30 for 'A', got nan"),
        ('{"A": 1, "B": Infinity}', "a weight from 0 to 1e30 for 'B', got inf"),
        ('{"A": 1, "B": 1' + 400 * "0" + "}", "a weight from 0 to 1e30 for 'B', got 10"),
        ('{"A": 1e308, "B": 1e308}', "a weight from 0 to 1e30 for 'A', got 1e\\+308"),
        ('{"A": true, "B": 1}', "a weight from 0 to 1e30 for 'A', got True"),
        ('{"A": "1", "B": 0}', "a weight from 0 to 1e30 for 'A', got '1'"),
        ('{"A": 5e-324, "B": 1}', "the weight of 'A', 5e-324, is nothing beside the largest, 1.0"),
        ('{"A": 0, "B": 0}', "not all 0"),
        ('["A", "B"]', "an object of domains and numbers"),
        ("{", "is not JSON"),
    ],
)
def test_weights_that_can_not_be_used_are_named(two, tmp_path, weights, message):
    if weights[0] in "{[":
        path = tmp_path / "w.json"
        path.write_text(weights)
        weights = str(path)
    with pytest.raises(ValueError, match=message):
        blend(two, weights)


def test_the_papers_weights_cover_the_pile_and_part_of_it(tmp_path):
    assert len(PAPER_WEIGHTS) == 22
    assert sum(PAPER_WEIGHTS.values()) == pytest.approx(100, abs=0.1)
    some = dataset(tmp_path / "some", {"ArXiv": 10, "Enron Emails": 10})
    weights = weights_of(some, "paper")
    assert weights["ArXiv"] / weights["Enron Emails"] == pytest.approx(11.75 / 0.17)
    assert sum(weights.values()) == pytest.approx(1)


def test_paths_that_megatron_would_split_are_refused(tmp_path):
    spaced = dataset(tmp_path / "a folder", {"A": 1})
    with pytest.raises(ValueError, match="splits its data list at white space"):
        data_path(blend(spaced))
