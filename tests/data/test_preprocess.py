"""Byte-identical to Megatron's tool; facts that add up, all or nothing, and mistakes by name."""

import errno
import fcntl
import hashlib
import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from golden import assert_same_files, write_golden
from text_files import line, write
from tokenizers import Tokenizer, processors

from megatron_infoentropy.data import journal
from megatron_infoentropy.data.blocks import BrokenLineError
from megatron_infoentropy.data.indexed import IndexedReader
from megatron_infoentropy.data.journal import slug
from megatron_infoentropy.data.manifest import (
    PILE_DOMAIN,
    DataOptions,
    DomainFacts,
    InputFacts,
    load_manifest,
)
from megatron_infoentropy.data.preprocess import preprocess
from megatron_infoentropy.data.tokenizer import END_OF_TEXT
from megatron_infoentropy.data.verify import verify

pytestmark = pytest.mark.usefixtures("small_blocks")
A, B = "Pile-CC", "ArXiv"
TEXTS = [
    "",
    "one",
    "def f(x):\n    return x ** 2\n" * 30,
    "gr\u00fc\u00df dich, \u4f60\u597d, \U0001f600, e\u0301, \u2028, \x00, \ufffd, \ufeff",
    "newer than some Unicode tables: \ua7cf, \U00016ebc, \U00016ecf, \u1c89, \U0001cc00",
    f"a {END_OF_TEXT} b",
    f"{END_OF_TEXT}{END_OF_TEXT}\n{END_OF_TEXT} ",
    "<s> is no text here </s>",
    "",
    " ",
    "\r\n\t  ",
    "x" * 5000,
    *(f"document number {i}\n" * (i % 7 + 1) for i in range(300)),
    "",
]
DOMAINS = [A if i % 3 else B for i in range(len(TEXTS))]
LINES = [line(text, domain) for text, domain in zip(TEXTS, DOMAINS, strict=True)]


@pytest.fixture
def inputs(tmp_path):
    """The texts in three files, two of them compressed."""
    return [
        write(tmp_path / "first.jsonl.zst", LINES[:100]),
        write(tmp_path / "second.jsonl", LINES[100:200]),
        write(tmp_path / "third.jsonl.gz", LINES[200:]),
    ]


@pytest.fixture(scope="module")
def starting(tokenizer_folder, tmp_path_factory):
    """A tokenizer that puts a start token before and another token behind, as Llama's may."""
    tokenizer = Tokenizer.from_file(str(tokenizer_folder / "tokenizer.json"))
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 600), ("</s>", 601)]
    )
    return save(tokenizer, tmp_path_factory.mktemp("starting"))


def save(tokenizer: Tokenizer, folder: Path) -> Path:
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": END_OF_TEXT}))
    return folder


def write_goldens(folder: Path, tokenizer_folder: Path, **options: bool) -> Path:
    folder.mkdir()
    for domain, prefix in ((A, "pile_cc"), (B, "arxiv")):
        texts = [t for t, d in zip(TEXTS, DOMAINS, strict=True) if d == domain]
        write_golden(folder / prefix, texts, tokenizer_folder, **options)
    return folder


@pytest.mark.parametrize(
    ("kind", "append_eod", "special_tokens"),
    [
        ("tokenizer_folder", True, True),
        ("starting", True, True),
        ("starting", False, True),
        ("starting", True, False),
    ],
)
def test_every_domain_is_byte_identical_to_megatrons_tool(
    inputs, request, tmp_path, kind, append_eod, special_tokens
):
    tokenizer: Path = request.getfixturevalue(kind)
    choices = {"append_eod": append_eod, "special_tokens": special_tokens}
    expected = write_goldens(tmp_path / "expected", tokenizer, **choices)
    preprocess(inputs, tokenizer, tmp_path / "out", options=DataOptions(**choices))
    assert_same_files(tmp_path / "out", expected)


@pytest.mark.usefixtures("worker_processes")
def test_the_number_of_workers_does_not_change_a_byte(inputs, tokenizer_folder, tmp_path):
    for workers in (1, 2, 5):
        preprocess(inputs, tokenizer_folder, tmp_path / f"out{workers}", workers=workers)
        assert len(list((tmp_path / f"out{workers}").iterdir())) == 6
        assert_same_files(tmp_path / f"out{workers}", tmp_path / "out1")


@pytest.mark.usefixtures("worker_processes")
def test_workers_start_beside_a_user_s_files_and_without_room_for_large_pipes(
    inputs, tokenizer_folder, tmp_path, monkeypatch
):
    """The system lets no user have more than 64 MiB of pipes, those of 32 workers."""

    def refuse(*_: object) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(fcntl, "fcntl", refuse)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tokenize.py").write_text("raise SystemExit('a script of the user')")
    preprocess(inputs, tokenizer_folder, tmp_path / "out")


def test_a_document_of_very_many_tokens_is_whole(tokenizer_folder, tmp_path):
    texts = ["before", "0 1 z 2 q\n" * 20_000, "after"]
    (tmp_path / "expected").mkdir()
    write_golden(tmp_path / "expected" / "a", texts, tokenizer_folder)
    text = write(tmp_path / "a.jsonl.zst", [line(text) for text in texts])
    found = preprocess([text], tokenizer_folder, tmp_path / "out")
    assert found.domains["A"].tokens > 150_000
    assert_same_files(tmp_path / "out", tmp_path / "expected")


def test_counts_of_everything_add_up(inputs, tokenizer_folder, tokenizer, tmp_path):
    out = tmp_path / "out"
    manifest = preprocess(inputs, tokenizer_folder, out)
    assert manifest == load_manifest(out)
    content = json.loads((out / "manifest.json").read_text())
    assert content["format"] == 3
    assert set(content["versions"]) == {"megatron-infoentropy", "tokenizers", "transformers"}
    assert content["tokenizer"] == {
        "sha256": tokenizer.sha256, "vocab_size": 600, "eod_id": tokenizer.eod_id, "start_ids": [],
    }  # fmt: skip
    assert verify(out) == []
    assert list(manifest.domains) == [B, A]
    for domain, facts in manifest.domains.items():
        texts = [t for t, d in zip(TEXTS, DOMAINS, strict=True) if d == domain]
        reader = IndexedReader(manifest.prefix(domain))
        assert facts.documents == len(texts) == len(reader)
        assert facts.bytes == sum(len(text.encode()) for text in texts)
        assert facts.tokens == reader.tokens.size
        assert all(reader[i][-1] == tokenizer.eod_id for i in range(len(reader)) if texts[i])
        assert facts.empty == texts.count("") > 0
    parts = (TEXTS[:100], TEXTS[100:200], TEXTS[200:])
    for path, facts, texts in zip(inputs, manifest.inputs, parts, strict=True):
        lines, size = len(texts), path.stat().st_size
        counts = InputFacts(path.name, size, lines, lines, texts.count(""), rejected=0, blank=0)
        assert replace(facts, sha256="", samples="") == counts


def test_a_manifest_that_can_not_be_used_is_named(inputs, tokenizer_folder, tmp_path):
    out = tmp_path / "out"
    preprocess(inputs, tokenizer_folder, out)
    content = json.loads((out / "manifest.json").read_text())
    for change, message in (
        ({"format": 2}, "expected format 3, got 2; preprocess again"),
        ({"dtype": "int32"}, "spans of .*bin do not add up to its [0-9]+ bytes"),
        ({"domains": {"A": {"prefix": "a"}}}, "no entry 'tokens'"),
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


@pytest.fixture
def unsaved(monkeypatch):
    """No run works long enough to have something to go on from, however slow the machine."""
    monkeypatch.setattr(journal, "SAVE_EVERY_S", math.inf)
    monkeypatch.setattr(journal, "SAVE_AFTER_INPUT_S", math.inf)


@pytest.mark.usefixtures("unsaved")
def test_an_error_leaves_an_earlier_dataset_as_it_was(
    inputs, tokenizer_folder, tmp_path, write_lines
):
    out = tmp_path / "out"
    preprocess(inputs, tokenizer_folder, out)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    with pytest.raises(ValueError, match=r"is not empty .* or give --overwrite"):
        preprocess(inputs[:1], tokenizer_folder, out)
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
        ([line("", A)], "the inputs hold no document with a token"),
        ([], "the inputs hold no document with a token"),
        ([line("a", f"d{i}") for i in range(501)], "more than 500 domains, the last is 'd500'"),
    ],
)
@pytest.mark.usefixtures("small_steps")
def test_domains_that_can_not_be_written_are_refused(write_lines, tokenizer_folder, lines, message):
    """Nothing is left, also where a journal was saved: there is nothing to go on to."""
    path = write_lines("a.jsonl", lines)
    with pytest.raises(ValueError, match=message):
        preprocess([path], tokenizer_folder, path.with_name("out"))
    assert [entry.name for entry in path.parent.iterdir()] == ["a.jsonl"]


def test_unusable_arguments_are_refused_before_any_work(inputs, tokenizer_folder, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(ValueError, match="at least one input file"):
        preprocess([], tokenizer_folder, out)
    with pytest.raises(ValueError, match=r"no such input file: .*gone\.jsonl"):
        preprocess([*inputs, tmp_path / "gone.jsonl"], tokenizer_folder, out)
    with pytest.raises(ValueError, match="is no tokenizer folder"):
        preprocess(inputs, tmp_path, out)
    with pytest.raises(ValueError, match="workers must be at least 1, got 0"):
        preprocess(inputs, tokenizer_folder, out, workers=0)
    with pytest.raises(ValueError, match="max_errors must be at least 0, got -1"):
        preprocess(inputs, tokenizer_folder, out, max_errors=-1)
    assert sorted(tmp_path.iterdir()) == sorted(inputs)


def test_texts_can_be_kept_in_one_dataset_or_split_by_another_key(
    write_lines, tokenizer_folder, tmp_path
):
    path = write_lines("a.jsonl", ['{"text": "a", "lang": "en"}', '{"text": "b", "lang": "de"}'])
    options = DataOptions(split_by=None)
    whole = preprocess([path], tokenizer_folder, tmp_path / "whole", options=options)
    facts = whole.domains["all"]
    assert facts == DomainFacts("all", 2, 4, 2, 0, 0, facts.bin_spans, facts.idx_sha256)
    options = DataOptions(split_by="lang")
    split = preprocess([path], tokenizer_folder, tmp_path / "split", options=options)
    assert list(split.domains) == ["de", "en"]
    options = DataOptions(split_by=None, text_key="lang")
    assert preprocess([path], tokenizer_folder, tmp_path / "key", options=options).inputs[0].lines
    options = DataOptions(split_by=PILE_DOMAIN)
    with pytest.raises(BrokenLineError, match=r"a\.jsonl:1: no domain: .* meta\.pile_set_name"):
        preprocess([path], tokenizer_folder, tmp_path / "out", options=options)


@pytest.mark.parametrize(
    ("domain", "name"),
    [
        ("Pile-CC", "pile_cc"),
        ("Wikipedia (en)", "wikipedia__en_"),
        ("../../etc", "______etc"),
        ("\u65b0\u95fb 2", "\u65b0\u95fb_2"),
        ("x" * 200, "x" * 200),
        ("x" * 300, "x" * 200 + "_" + hashlib.sha256(b"x" * 300).hexdigest()[:16]),
        (
            "\u4e2d" * 200,  # no character is cut in two
            "\u4e2d" * 66 + "_" + hashlib.sha256(("\u4e2d" * 200).encode()).hexdigest()[:16],
        ),
    ],
)
def test_domains_become_file_names(domain, name):
    assert slug(domain) == name


def test_a_file_under_two_names_is_taken_once(write_lines, tokenizer_folder, tmp_path):
    path, link, symlink = (
        write_lines("a.jsonl", [line("a")]),
        tmp_path / "b.jsonl",
        tmp_path / "c.jsonl",
    )
    link.hardlink_to(path)
    symlink.symlink_to(path)
    for other in (link, symlink):
        with pytest.raises(ValueError, match=rf"{path} and {other} is one file, given 2 times"):
            preprocess([path, other], tokenizer_folder, tmp_path / "o")


def test_the_room_works_without_torch_and_megatron(inputs, tokenizer_folder, tmp_path):
    program = f"""
import sys
from importlib.machinery import PathFinder
from pathlib import Path
find = PathFinder.find_spec
PathFinder.find_spec = lambda name, *rest: None if name in ("torch", "megatron") else find(name, *rest)
from megatron_infoentropy.data import corpus, indexed, tokenizer
from megatron_infoentropy.data.preprocess import preprocess
paths = {[str(path) for path in (inputs[0], tokenizer_folder, tmp_path / "o")]!r}
preprocess([Path(paths[0])], *map(Path, paths[1:]))
heavy = {{"torch", "megatron"}} & set(sys.modules)
assert not heavy, heavy
"""  # noqa: E501
    subprocess.run([sys.executable, "-c", program], check=True, cwd=Path(__file__).parents[2])
    assert (tmp_path / "o" / "manifest.json").is_file()


def test_a_domain_without_any_token_is_left_out_and_said(write_lines, tokenizer_folder, tmp_path):
    """Megatron can not open an empty dataset; failing after a day would be worse."""
    path = write_lines("a.jsonl", [line("a", A), line("", B), line("", B)])
    manifest = preprocess([path], tokenizer_folder, tmp_path / "out")
    assert list(manifest.domains) == [A]
    assert manifest.left_out == {B: 2}
    assert not (tmp_path / "out" / "arxiv.bin").exists()
    assert np.load(tmp_path / "out" / manifest.token_counts).shape == (1, 600)
