"""From text to datasets: the bytes Megatron's tool would write, all of them or none."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder
from text_files import WriteLines, line, write
from transformers import AutoTokenizer

from megatron_infoentropy.data import encode
from megatron_infoentropy.data.indexed import IndexedReader
from megatron_infoentropy.data.jsonl import BrokenLineError
from megatron_infoentropy.data.manifest import DomainFacts, load_manifest
from megatron_infoentropy.data.preprocess import preprocess, slug
from megatron_infoentropy.data.tokenizer import LoadedTokenizer

A, B = "Pile-CC", "ArXiv"
KEYS = {"format", "tokenizer", "dtype", "append_eod", "domains", "token_counts"}
TEXTS = [
    "",
    "one",
    "def f(x):\n    return x ** 2\n" * 30,
    "gr\u00fc\u00df dich, \u4f60\u597d, \U0001f600, \ua7cf, \U00016ecf",
    "a <|endoftext|> b",
    "",
    " ",
    *(f"document number {i}\n" * (i % 7 + 1) for i in range(300)),
]
DOMAINS = [A if i % 3 else B for i in range(len(TEXTS))]


@pytest.fixture(autouse=True)
def many_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of these few texts too, so that there is something to reorder and to add up."""
    monkeypatch.setattr(encode, "_BATCH_DOCUMENTS", 10)


@pytest.fixture
def inputs(tmp_path: Path) -> list[Path]:
    """The texts in two files, one of them compressed."""
    lines = [line(text, domain) for text, domain in zip(TEXTS, DOMAINS, strict=True)]
    return [
        write(tmp_path / "first.jsonl.zst", lines[:100]),
        write(tmp_path / "second.jsonl", lines[100:]),
    ]


def expected_files(tokenizer_folder: Path, folder: Path, *, append_eod: bool) -> None:
    """What tools/preprocess_data.py writes for each domain, with its own classes."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    for domain, prefix in ((A, "pile_cc"), (B, "arxiv")):
        dtype = DType.optimal_dtype(len(tokenizer))
        builder = IndexedDatasetBuilder(str(folder / f"{prefix}.bin"), dtype=dtype)
        for text in (t for t, d in zip(TEXTS, DOMAINS, strict=True) if d == domain):
            ids = tokenizer(text).input_ids
            if ids and append_eod:
                ids.append(tokenizer.eos_token_id)
            builder.add_document(np.array(ids, dtype=np.int64), [len(ids)] if ids else [])
        builder.finalize(str(folder / f"{prefix}.idx"))


def assert_same_files(found: Path, expected: Path) -> None:
    for path in expected.iterdir():
        assert (found / path.name).read_bytes() == path.read_bytes(), path.name


@pytest.mark.parametrize("append_eod", [True, False])
def test_every_domain_is_byte_identical_to_megatrons_tool(
    inputs: list[Path], tokenizer_folder: Path, tmp_path: Path, append_eod: bool
) -> None:
    (tmp_path / "expected").mkdir()
    expected_files(tokenizer_folder, tmp_path / "expected", append_eod=append_eod)
    preprocess(inputs, tokenizer_folder, tmp_path / "out", append_eod=append_eod)
    assert_same_files(tmp_path / "out", tmp_path / "expected")


def test_the_number_of_workers_does_not_change_a_byte(
    inputs: list[Path], tokenizer_folder: Path, tmp_path: Path
) -> None:
    for workers in (1, 2, 5):
        preprocess(inputs, tokenizer_folder, tmp_path / f"out{workers}", workers=workers)
        assert len(list((tmp_path / f"out{workers}").iterdir())) == 6
        assert_same_files(tmp_path / f"out{workers}", tmp_path / "out1")


def test_counts_of_everything_add_up(
    inputs: list[Path], tokenizer_folder: Path, tokenizer: LoadedTokenizer, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    summary = preprocess(inputs, tokenizer_folder, out)
    manifest = load_manifest(out)
    assert summary.manifest == manifest
    assert list(manifest.domains) == [B, A]
    for domain, facts in manifest.domains.items():
        texts = [t for t, d in zip(TEXTS, DOMAINS, strict=True) if d == domain]
        reader = IndexedReader(manifest.prefix(domain))
        assert facts.documents == len(texts) == len(reader)
        assert facts.bytes == sum(len(text.encode()) for text in texts)
        assert facts.tokens == reader.tokens.size
        assert all(reader[i][-1] == tokenizer.eod_id for i in range(len(reader)) if texts[i])
    assert summary.documents == len(TEXTS)
    assert summary.empty_documents == TEXTS.count("") == 2
    assert summary.tokens == sum(facts.tokens for facts in manifest.domains.values())


def test_the_frequency_table_is_that_of_the_files(
    inputs: list[Path], tokenizer_folder: Path, tmp_path: Path
) -> None:
    preprocess(inputs, tokenizer_folder, tmp_path / "out", workers=2)
    manifest = load_manifest(tmp_path / "out")
    table = manifest.token_counts()
    assert (table.dtype.name, table.shape) == ("int64", (2, 600))
    for row, facts in zip(table, manifest.domains.values(), strict=True):
        raw = np.fromfile(tmp_path / "out" / f"{facts.prefix}.bin", dtype=manifest.dtype)
        assert np.array_equal(row, np.bincount(raw, minlength=600))


def test_the_manifest_is_the_agreed_format(
    inputs: list[Path], tokenizer_folder: Path, tokenizer: LoadedTokenizer, tmp_path: Path
) -> None:
    preprocess(inputs, tokenizer_folder, tmp_path / "out")
    content = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert set(content) == KEYS
    assert content["format"] == 1
    assert content["tokenizer"] == {
        "sha256": tokenizer.sha256,
        "vocab_size": 600,
        "eod_id": tokenizer.eod_id,
    }
    assert (content["dtype"], content["append_eod"]) == ("uint16", True)
    assert content["token_counts"] == "token_counts.npy"
    assert set(content["domains"][A]) == {"prefix", "documents", "tokens", "bytes"}
    assert content["domains"][A]["prefix"] == "pile_cc"


def test_a_manifest_that_can_not_be_used_is_named(
    inputs: list[Path], tokenizer_folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    preprocess(inputs, tokenizer_folder, out)
    content = json.loads((out / "manifest.json").read_text())
    for change, message in (
        ({"format": 2}, "expected format 1, got 2; preprocess again"),
        ({"domains": {"A": {"prefix": "a"}}}, "missing 3 required"),
        ({"tokenizer": None}, "must be a mapping"),
    ):
        (out / "manifest.json").write_text(json.dumps({**content, **change}))
        with pytest.raises(ValueError, match=rf"manifest\.json can not be used: .*{message}"):
            load_manifest(out)
    (out / "manifest.json").write_text("{}")
    with pytest.raises(ValueError, match="no entry 'format'"):
        load_manifest(out)
    with pytest.raises(ValueError, match="is no token dataset"):
        load_manifest(tmp_path)


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("name", ["bad.jsonl", "bad.jsonl.zst"])
def test_a_broken_line_names_file_and_line_and_leaves_nothing(
    inputs: list[Path], tokenizer_folder: Path, tmp_path: Path, name: str, workers: int
) -> None:
    lines = [line("text " * 200, A)] * 3000
    bad = write(tmp_path / name, [*lines[:2000], '{"text": "cut o', *lines[2000:]])
    before = sorted(tmp_path.iterdir())
    with pytest.raises(BrokenLineError, match=rf"{name}:2001: not JSON: Unterminated string"):
        preprocess([*inputs, bad], tokenizer_folder, tmp_path / "out", workers=workers)
    assert sorted(tmp_path.iterdir()) == before


def test_a_truncated_input_leaves_nothing(
    inputs: list[Path], tokenizer_folder: Path, tmp_path: Path
) -> None:
    inputs[0].write_bytes(inputs[0].read_bytes()[:-3])
    with pytest.raises(BrokenLineError, match=r"first\.jsonl\.zst:\d+: .* the file is truncated"):
        preprocess(inputs, tokenizer_folder, tmp_path / "out")
    assert sorted(tmp_path.iterdir()) == sorted(inputs)


def test_an_error_leaves_an_earlier_dataset_as_it_was(
    inputs: list[Path], tokenizer_folder: Path, tmp_path: Path, write_lines: WriteLines
) -> None:
    out = tmp_path / "out"
    preprocess(inputs, tokenizer_folder, out)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    with pytest.raises(ValueError, match=r"is not empty .* or allow overwriting"):
        preprocess(inputs, tokenizer_folder, out)
    with pytest.raises(BrokenLineError):
        preprocess([write_lines("b.jsonl", ["{"])], tokenizer_folder, out, overwrite=True)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    preprocess([write_lines("c.jsonl", [line("a", "C")])], tokenizer_folder, out, overwrite=True)
    assert list(load_manifest(out).domains) == ["C"]
    assert not (out / "pile_cc.bin").exists()


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (
            [line("a", "Pile CC"), line("b", "pile-cc")],
            "'Pile CC' and 'pile-cc' would both be",
        ),
        ([line("a", "--")], "the domain '--' has no letter or digit"),
        ([line("a", A), line("", B), line("", B)], "the 2 documents of 'ArXiv' hold no token"),
        ([], "the inputs hold no document"),
    ],
)
def test_domains_that_can_not_be_written_are_refused(
    write_lines: WriteLines, tokenizer_folder: Path, lines: list[str], message: str
) -> None:
    path = write_lines("a.jsonl", lines)
    with pytest.raises(ValueError, match=message):
        preprocess([path], tokenizer_folder, path.with_name("out"))
    assert [entry.name for entry in path.parent.iterdir()] == ["a.jsonl"]


def test_unusable_arguments_are_refused_before_any_work(
    inputs: list[Path], tokenizer_folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    with pytest.raises(ValueError, match="at least one input file"):
        preprocess([], tokenizer_folder, out)
    with pytest.raises(ValueError, match=r"no such input file: .*gone\.jsonl"):
        preprocess([*inputs, tmp_path / "gone.jsonl"], tokenizer_folder, out)
    with pytest.raises(ValueError, match="is no tokenizer folder"):
        preprocess(inputs, tmp_path, out)
    with pytest.raises(ValueError, match="workers must be at least 1, got 0"):
        preprocess(inputs, tokenizer_folder, out, workers=0)


def test_texts_can_be_kept_in_one_dataset_or_split_by_another_key(
    write_lines: WriteLines, tokenizer_folder: Path, tmp_path: Path
) -> None:
    path = write_lines("a.jsonl", ['{"text": "a", "lang": "en"}', '{"text": "b", "lang": "de"}'])
    whole = preprocess([path], tokenizer_folder, tmp_path / "whole", split_by=None)
    assert whole.manifest.domains == {"all": DomainFacts("all", 2, 4, 2)}
    split = preprocess([path], tokenizer_folder, tmp_path / "split", split_by="lang")
    assert list(split.manifest.domains) == ["de", "en"]
    with pytest.raises(BrokenLineError, match=r"a\.jsonl:1: no domain: .* meta\.pile_set_name"):
        preprocess([path], tokenizer_folder, tmp_path / "out")


@pytest.mark.parametrize(
    ("domain", "name"),
    [
        ("Pile-CC", "pile_cc"),
        ("Wikipedia (en)", "wikipedia__en_"),
        ("../../etc", "______etc"),
        ("\u65b0\u95fb 2", "\u65b0\u95fb_2"),
    ],
)
def test_domains_become_file_names(domain: str, name: str) -> None:
    assert slug(domain) == name


def test_the_room_works_without_torch_transformers_and_megatron(
    inputs: list[Path], tokenizer_folder: Path, tmp_path: Path
) -> None:
    program = f"""
import sys
from pathlib import Path
from megatron_infoentropy.data import corpus, indexed, tokenizer
from megatron_infoentropy.data.preprocess import preprocess
paths = {[str(path) for path in (inputs[0], tokenizer_folder, tmp_path / "o")]!r}
preprocess([Path(paths[0])], *map(Path, paths[1:]))
heavy = {{"torch", "transformers", "megatron"}} & set(sys.modules)
assert not heavy, heavy
"""
    subprocess.run([sys.executable, "-c", program], check=True, cwd=Path(__file__).parents[2])
    assert (tmp_path / "o" / "manifest.json").is_file()
