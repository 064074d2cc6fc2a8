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
from unittest.mock import Mock

import pytest
from golden import assert_same_files, write_golden
from text_files import line, write
from tokenizers import Tokenizer, processors

from megatron_infoentropy.data import journal
from megatron_infoentropy.data.blocks import BrokenLineError
from megatron_infoentropy.data.indexed import IndexedReader
from megatron_infoentropy.data.journal import slug
from megatron_infoentropy.data.manifest import (
    DataOptions,
    InputFacts,
    load_manifest,
)
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
    "0 1 z 2 q\n" * 20_000,  # many times as much as one block
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
    folder = tmp_path_factory.mktemp("starting")
    tokenizer = Tokenizer.from_file(str(tokenizer_folder / "tokenizer.json"))
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 600), ("</s>", 601)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": END_OF_TEXT}))
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
    prepare, inputs, request, tmp_path, kind, append_eod, special_tokens
):
    tokenizer, expected = request.getfixturevalue(kind), tmp_path / "expected"
    choices = {"append_eod": append_eod, "special_tokens": special_tokens}
    expected.mkdir()
    for domain, prefix in ((A, "pile_cc"), (B, "arxiv")):
        texts = [t for t, d in zip(TEXTS, DOMAINS, strict=True) if d == domain]
        write_golden(expected / prefix, texts, tokenizer, **choices)
    prepare(inputs, tokenizer=tokenizer, options=DataOptions(**choices))
    assert_same_files(tmp_path / "out", expected)


@pytest.mark.usefixtures("worker_processes")
def test_the_number_of_workers_does_not_change_a_byte(prepare, inputs, tmp_path):
    for workers in (1, 2, 5):
        made = prepare(inputs, f"out{workers}", workers=workers).folder
        assert len(list(made.iterdir())) == 6
        assert_same_files(made, tmp_path / "out1")


@pytest.mark.usefixtures("worker_processes")
def test_workers_start_beside_a_user_s_files_and_without_room_for_large_pipes(
    prepare, inputs, tmp_path, monkeypatch
):
    """The system lets no user have more than 64 MiB of pipes, those of 32 workers."""
    monkeypatch.setattr(fcntl, "fcntl", Mock(side_effect=PermissionError(errno.EPERM, "no")))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tokenize.py").write_text("raise SystemExit('a script of the user')")
    prepare(inputs)


def test_counts_of_everything_add_up(prepare, inputs, tokenizer):
    manifest = prepare(inputs)
    assert manifest == load_manifest(manifest.folder)
    content = json.loads((manifest.folder / "manifest.json").read_text())
    assert content["format"] == 3
    assert set(content["versions"]) == {"megatron-infoentropy", "tokenizers", "transformers"}
    assert content["tokenizer"] == {
        "sha256": tokenizer.sha256, "vocab_size": 600, "eod_id": tokenizer.eod_id, "start_ids": [],
    }  # fmt: skip
    assert verify(manifest.folder) == []
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


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 2}, "expected format 3, got 2; preprocess again"),
        ({"dtype": "int32"}, "spans of .*bin do not add up to its [0-9]+ bytes"),
        ({"domains": {"A": {"prefix": "a"}}}, "no entry 'tokens'"),
        ({"tokenizer": None}, "must be a mapping"),
        (None, "no entry 'format'"),
    ],
)
def test_a_manifest_that_can_not_be_used_is_named(prepare, tmp_path, change, message):
    path = prepare(write(tmp_path / "a.jsonl", [line("a")])).folder / "manifest.json"
    content = {} if change is None else json.loads(path.read_text()) | change
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=rf"manifest\.json can not be used: .*{message}"):
        load_manifest(path.parent)


def test_an_error_leaves_an_earlier_dataset_as_it_was(prepare, inputs, tmp_path, monkeypatch):
    # No run works long enough to have something to go on from, however slow the machine.
    monkeypatch.setattr(journal, "SAVE_EVERY_S", math.inf)
    monkeypatch.setattr(journal, "SAVE_AFTER_INPUT_S", math.inf)
    out = prepare(inputs).folder
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    with pytest.raises(ValueError, match=r"is not empty .* or give --overwrite"):
        prepare(inputs[:1])
    with pytest.raises(BrokenLineError):
        prepare(write(tmp_path / "b.jsonl", ["{"]), overwrite=True)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    made = prepare(write(tmp_path / "c.jsonl", [line("a", "C")]), overwrite=True)
    assert list(made.domains) == ["C"]
    assert not (out / "pile_cc.bin").exists()


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([line("a", "Pile CC"), line("b", "pile-cc")], "'Pile CC' and 'pile-cc' would both be"),
        ([line("a", "--")], "the domain '--' has no letter or digit"),
        ([line("", A)], "the inputs hold no document with a token"),
        ([], "the inputs hold no document with a token"),
        ([line("a", f"d{i}") for i in range(501)], "more than 500 domains, the last is 'd500'"),
    ],
)
@pytest.mark.usefixtures("small_steps")
def test_domains_that_can_not_be_written_are_refused(prepare, tmp_path, lines, message):
    """Nothing is left, also where a journal was saved: there is nothing to go on to."""
    path = write(tmp_path / "a.jsonl", lines)
    with pytest.raises(ValueError, match=message):
        prepare(path)
    assert list(tmp_path.iterdir()) == [path]


def test_unusable_arguments_are_refused_before_any_work(prepare, inputs, tmp_path):
    for given, options, message in (
        ([], {}, "at least one input file"),
        ([*inputs, tmp_path / "gone.jsonl"], {}, r"no such input file: .*gone\.jsonl"),
        (inputs, {"tokenizer": tmp_path}, "is no tokenizer folder"),
        (inputs, {"workers": 0}, "workers must be at least 1, got 0"),
        (inputs, {"max_errors": -1}, "max_errors must be at least 0, got -1"),
    ):
        with pytest.raises(ValueError, match=message):
            prepare(given, **options)
    assert sorted(tmp_path.iterdir()) == sorted(inputs)


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


def test_a_file_under_two_names_is_taken_once(prepare, tmp_path):
    path = write(tmp_path / "a.jsonl", [line("a")])
    for link in (tmp_path / "b.jsonl").hardlink_to, (tmp_path / "c.jsonl").symlink_to:
        link(path)
        with pytest.raises(ValueError, match=rf"{path} and {link.__self__} is one file, given 2"):
            prepare([path, link.__self__])


def test_the_room_works_without_torch_and_megatron(inputs, tokenizer_folder, tmp_path):
    program = """
import sys
from importlib.machinery import PathFinder
from pathlib import Path
find = PathFinder.find_spec
gone = ("torch", "megatron")
PathFinder.find_spec = lambda name, *rest: None if name in gone else find(name, *rest)
from megatron_infoentropy.data import corpus, indexed, tokenizer
from megatron_infoentropy.data.preprocess import preprocess
text, *folders = map(Path, sys.argv[1:])
preprocess([text], *folders)
"""
    words = [sys.executable, "-c", program, inputs[0], tokenizer_folder, tmp_path / "o"]
    subprocess.run(words, check=True, cwd=Path(__file__).parents[2])
    assert (tmp_path / "o" / "manifest.json").is_file()
