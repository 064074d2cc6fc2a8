"""The exact mode around a faster engine, tried with engines that are wrong in known ways."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, processors
from transformers import AutoTokenizer

from megatron_infoentropy.data import fast_engine
from megatron_infoentropy.data.fast_engine import (
    CHECK_EVERY,
    InexactEngineError,
    disagreements,
    exact_engine,
)
from megatron_infoentropy.data.tokenizer import END_OF_TEXT, Engine, LoadedTokenizer, load_tokenizer

NO_LETTERS = "\u0133\u0800\u1c89"  # the engine below takes them for signs
TEXTS = [
    "plain words",
    "",
    "na\u00efve \u4f60\u597d",
    "a\u1c89b and \u0133",
    f"a {END_OF_TEXT} b",
    "rare \U000e0041\U000f0000",
    "more",
    "",
]


def load_wrong(content: str) -> Engine:
    """An engine with older tables: some letters are signs to it, and it knows no special token."""
    tokenizer = Tokenizer.from_str(json.dumps({**json.loads(content), "added_tokens": []}))

    def encode(texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        rows = [ids_of(text) for text in texts]
        lengths = np.array([len(row) for row in rows], dtype=np.int64)
        return np.array([token for row in rows for token in row], dtype=np.int32), lengths

    def ids_of(text: str) -> list[int]:
        pieces, piece = [], ""
        for character in text:  # a sign between letters ends a word
            if character in NO_LETTERS:
                pieces += [piece, character]
                piece = ""
            else:
                piece += character
        encodings = [tokenizer.encode(each, add_special_tokens=False) for each in [*pieces, piece]]
        return [token for encoding in encodings for token in encoding.ids]

    return encode


@pytest.fixture
def content(tokenizer_folder: Path) -> str:
    return (tokenizer_folder / "tokenizer.json").read_text()


@pytest.fixture
def few_points(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fast_engine, "LAST_TRIED", 0x1FFF)


@pytest.mark.usefixtures("few_points")
def test_calibration_finds_exactly_the_characters_that_are_cut_otherwise(content: str) -> None:
    assert disagreements(content, load_wrong) == [ord(letter) for letter in NO_LETTERS]


def test_ids_are_those_of_transformers_whatever_the_engine_gets_wrong(
    content: str, tokenizer: LoadedTokenizer, tokenizer_folder: Path
) -> None:
    points = [ord(letter) for letter in NO_LETTERS]
    asked: list[str] = []
    wrong = load_wrong(content)

    def noting(texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        asked.extend(texts)
        return wrong(texts)

    encode = exact_engine(noting, tokenizer, points, special_tokens=True)
    tokens, lengths = encode(TEXTS)
    reference = AutoTokenizer.from_pretrained(tokenizer_folder)
    expected = [reference(text).input_ids for text in TEXTS]
    assert lengths.tolist() == [len(ids) for ids in expected]
    assert tokens.tolist() == [token for ids in expected for token in ids]
    assert asked == [TEXTS[0], TEXTS[1], TEXTS[2], TEXTS[6], TEXTS[7]]


@pytest.mark.parametrize("special_tokens", [True, False])
def test_tokens_around_a_text_are_put_there_too(
    content: str, tokenizer_folder: Path, tmp_path: Path, special_tokens: bool
) -> None:
    tokenizer = Tokenizer.from_str(content)
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s> </s>", special_tokens=[("<s>", 600), ("</s>", 601)]
    )
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": END_OF_TEXT}))
    loaded = load_tokenizer(tmp_path)
    points = [ord(letter) for letter in NO_LETTERS]
    encode = exact_engine(load_wrong(content), loaded, points, special_tokens=special_tokens)
    texts = [*TEXTS, "<s> spelled out"]
    tokens, lengths = encode(texts)
    expected = [loaded.tokenizer.encode(t, add_special_tokens=special_tokens).ids for t in texts]
    assert lengths.tolist() == [len(ids) for ids in expected]
    assert tokens.tolist() == [token for ids in expected for token in ids]


def test_an_engine_that_is_wrong_elsewhere_is_caught(
    content: str, tokenizer: LoadedTokenizer
) -> None:
    """Of every 512 documents one is encoded twice, over any number of calls."""
    right = load_wrong(content)

    def wrong(texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        return right([text.upper() for text in texts])

    encode = exact_engine(wrong, tokenizer, [], special_tokens=True)
    with pytest.raises(InexactEngineError, match=r"other ids .* for 'a word'; .*--engine hf"):
        encode(["a word"])
    encode = exact_engine(wrong, tokenizer, [], special_tokens=True)
    for text in ["1"] + ["a word"] * (CHECK_EVERY - 1):
        encode([text])
    with pytest.raises(InexactEngineError, match="other ids"):
        encode(["a word"])


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"normalizer": {"type": "NFC"}}, "it normalizes texts"),
        ({"pre_tokenizer": {"type": "Metaspace"}}, "it is not byte-level"),
        ({"pre_tokenizer": None}, "it is not byte-level"),
        ({"model": {"type": "Unigram"}}, "its model is no BPE"),
        ({"model": {"type": "BPE", "byte_fallback": True}}, "it falls back to bytes"),
        ({"model": {"type": "BPE", "dropout": 0.1}}, "it drops merges at random"),
        (
            {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True}},
            "it adds a space before texts",
        ),
    ],
)
def test_tokenizers_that_calibration_shows_nothing_about_are_refused(
    content: str, change: dict[str, object], reason: str
) -> None:
    with pytest.raises(InexactEngineError, match=f"{reason}; use --engine hf"):
        disagreements(json.dumps({**json.loads(content), **change}), load_wrong)


def test_calibration_is_done_once_for_a_tokenizer(
    content: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(fast_engine, "version", lambda name: "1.0")
    monkeypatch.setattr(fast_engine, "disagreements", lambda *_: done.append("") or [5, 7])
    for _ in range(2):
        assert fast_engine.cached_disagreements(content, load_wrong) == [5, 7]
    assert len(done) == 1
    fast_engine.cached_disagreements(content + " ", load_wrong)
    assert len(done) == 2


def test_without_the_package_the_engine_is_refused_by_name(
    tokenizer: LoadedTokenizer, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(name: str) -> object:
        raise ImportError(name)

    monkeypatch.setattr(fast_engine, "import_module", missing)
    with pytest.raises(InexactEngineError, match="needs the package of that name"):
        fast_engine.fast_engine(tokenizer, special_tokens=True)


@pytest.mark.usefixtures("few_points")
def test_gigatoken_itself_gives_the_same_ids(
    tokenizer: LoadedTokenizer, tokenizer_folder: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    pytest.importorskip("gigatoken", reason="gigatoken is not installed")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    encode = fast_engine.fast_engine(tokenizer, special_tokens=True)
    tokens, lengths = encode(TEXTS)
    expected = [tokenizer.tokenizer.encode(text).ids for text in TEXTS]
    assert lengths.tolist() == [len(ids) for ids in expected]
    assert tokens.tolist() == [token for ids in expected for token in ids]
