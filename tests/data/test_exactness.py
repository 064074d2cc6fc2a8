"""Byte-identical to Megatron's tool: hard texts, special tokens, vocabularies, any layout."""

import json
from pathlib import Path

import pytest
from golden import assert_same_files, write_golden
from text_files import line, write
from tokenizers import Tokenizer, processors

from megatron_infoentropy.data import blocks
from megatron_infoentropy.data.manifest import DataOptions
from megatron_infoentropy.data.preprocess import preprocess
from megatron_infoentropy.data.tokenizer import END_OF_TEXT

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


@pytest.fixture(autouse=True)
def many_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of these few texts too, so that there is something to reorder and to add up."""
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 2000)


@pytest.fixture
def inputs(tmp_path: Path) -> list[Path]:
    """The texts in three files, two of them compressed."""
    return [
        write(tmp_path / "first.jsonl.zst", LINES[:100]),
        write(tmp_path / "second.jsonl", LINES[100:200]),
        write(tmp_path / "third.jsonl.gz", LINES[200:]),
    ]


@pytest.fixture(scope="module")
def starting(tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
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
    inputs: list[Path],
    request: pytest.FixtureRequest,
    tmp_path: Path,
    kind: str,
    append_eod: bool,
    special_tokens: bool,
) -> None:
    tokenizer: Path = request.getfixturevalue(kind)
    choices = {"append_eod": append_eod, "special_tokens": special_tokens}
    expected = write_goldens(tmp_path / "expected", tokenizer, **choices)
    preprocess(inputs, tokenizer, tmp_path / "out", options=DataOptions(**choices))
    assert_same_files(tmp_path / "out", expected)


@pytest.mark.usefixtures("worker_processes")
def test_the_number_of_workers_does_not_change_a_byte(
    inputs: list[Path], tokenizer_folder: Path, tmp_path: Path
) -> None:
    for workers in (1, 2, 5):
        preprocess(inputs, tokenizer_folder, tmp_path / f"out{workers}", workers=workers)
        assert len(list((tmp_path / f"out{workers}").iterdir())) == 6
        assert_same_files(tmp_path / f"out{workers}", tmp_path / "out1")


def test_a_document_of_very_many_tokens_is_whole(tokenizer_folder: Path, tmp_path: Path) -> None:
    texts = ["before", "0 1 z 2 q\n" * 20_000, "after"]
    (tmp_path / "expected").mkdir()
    write_golden(tmp_path / "expected" / "a", texts, tokenizer_folder)
    text = write(tmp_path / "a.jsonl.zst", [line(text) for text in texts])
    found = preprocess([text], tokenizer_folder, tmp_path / "out")
    assert found.domains["A"].tokens > 150_000
    assert_same_files(tmp_path / "out", tmp_path / "expected")
