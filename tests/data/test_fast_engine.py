"""The exact mode around a faster engine, tried with engines that are wrong in known ways."""

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from unittest.mock import Mock

import numpy as np
import pytest
from text_files import assert_ids, line, write
from tokenizers import Tokenizer, processors
from transformers import AutoTokenizer

from megatron_infoentropy.data import blocks, fast_engine, journal
from megatron_infoentropy.data.blocks import BrokenLineError
from megatron_infoentropy.data.fast_engine import (
    CHECK_EVERY,
    InexactEngineError,
    disagreements,
    exact_engine,
)
from megatron_infoentropy.data.rewrite import merge
from megatron_infoentropy.data.tokenizer import END_OF_TEXT, Engine

NO_LETTERS = "\u0133\u0800\u1c89"  # the engine below takes them for signs
POINTS = [ord(letter) for letter in NO_LETTERS]
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
        pieces = re.split(f"([{NO_LETTERS}])", text)  # a sign between letters ends a word
        encodings = [tokenizer.encode(piece, add_special_tokens=False) for piece in pieces]
        return [token for encoding in encodings for token in encoding.ids]

    return encode


@pytest.fixture
def content(tokenizer_folder):
    return (tokenizer_folder / "tokenizer.json").read_text()


@pytest.fixture
def few_points(monkeypatch):
    monkeypatch.setattr(fast_engine, "LAST_TRIED", 0x1FFF)


@pytest.mark.usefixtures("few_points")
def test_calibration_finds_exactly_the_characters_that_are_cut_otherwise(content):
    assert disagreements(content, load_wrong) == POINTS


def test_ids_are_those_of_transformers_whatever_the_engine_gets_wrong(
    content, tokenizer, tokenizer_folder
):
    wrong = Mock(side_effect=load_wrong(content))
    encode = exact_engine(wrong, tokenizer, POINTS, special_tokens=True)
    reference = AutoTokenizer.from_pretrained(tokenizer_folder)
    assert_ids(encode(TEXTS), [reference(text).input_ids for text in TEXTS])
    wrong.assert_called_once_with([TEXTS[0], TEXTS[1], TEXTS[2], TEXTS[6], TEXTS[7]])


@pytest.mark.parametrize("special_tokens", [True, False])
def test_tokens_around_a_text_are_put_there_too(content, tokenizer, special_tokens):
    starting = Tokenizer.from_str(content)
    starting.add_special_tokens(["<s>", "</s>"])
    starting.post_processor = processors.TemplateProcessing(
        single="<s> $A </s> </s>", special_tokens=[("<s>", 600), ("</s>", 601)]
    )
    loaded = replace(tokenizer, tokenizer=starting, vocab_size=602)
    encode = exact_engine(load_wrong(content), loaded, POINTS, special_tokens=special_tokens)
    texts = [*TEXTS, "<s> spelled out"]
    expected = [starting.encode(text, add_special_tokens=special_tokens).ids for text in texts]
    assert_ids(encode(texts), expected)


def test_an_engine_that_is_wrong_elsewhere_is_caught(content, tokenizer):
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
def test_tokenizers_that_calibration_shows_nothing_about_are_refused(content, change, reason):
    with pytest.raises(InexactEngineError, match=f"{reason}$"):
        disagreements(json.dumps({**json.loads(content), **change}), load_wrong)


def test_calibration_is_done_once_for_a_way_of_cutting_text(content, tmp_path, monkeypatch):
    tried = Mock(return_value=[5, 7])
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(fast_engine, "version", lambda name: "1.0")
    monkeypatch.setattr(fast_engine, "disagreements", tried)
    other = json.loads(content)
    other["model"]["merges"] = other["model"]["merges"][:50]  # of another vocabulary
    for same in (content, content, json.dumps(other)):
        assert fast_engine.cached_disagreements(same, load_wrong) == [5, 7]
    assert tried.call_count == 1
    other["pre_tokenizer"] = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
    fast_engine.cached_disagreements(json.dumps(other), load_wrong)
    assert tried.call_count == 2
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))  # which can not be written to
    assert fast_engine.cached_disagreements(content, load_wrong) == [5, 7]


def test_auto_takes_what_is_installed_and_shown_to_be_exact_and_says_why(tokenizer, monkeypatch):
    def choose(asked: str) -> tuple[str, str]:
        return fast_engine.choose_engine(asked, tokenizer, special_tokens=True)

    why = "gigatoken, which is many times as fast, is not installed (pip install gigatoken)"
    monkeypatch.setattr(fast_engine, "import_module", Mock(side_effect=ImportError))
    assert choose("auto") == ("hf", why)
    with pytest.raises(InexactEngineError, match=f"{re.escape(why)}; use --engine hf"):
        choose("gigatoken")
    monkeypatch.setattr(fast_engine, "import_module", lambda _: None)
    broken = {**json.loads(tokenizer.tokenizer.to_str()), "normalizer": {"type": "NFC"}}
    whole, tokenizer = (
        tokenizer,
        replace(tokenizer, tokenizer=Tokenizer.from_str(json.dumps(broken))),
    )
    why = "gigatoken can not be shown to be exact for this tokenizer: it normalizes texts"
    assert choose("auto") == ("hf", why)
    tokenizer = whole
    monkeypatch.setattr(fast_engine, "load_gigatoken", load_wrong)
    monkeypatch.setattr(fast_engine, "cached_disagreements", lambda *_: [])
    assert choose("auto") == choose("gigatoken")
    assert (choose("auto")[0], choose("hf")[0]) == ("gigatoken", "hf")
    with pytest.raises(ValueError, match="must be one of auto, hf, gigatoken, got 'spacy'"):
        choose("spacy")


def test_shards_of_two_engines_are_joined_and_a_run_goes_on_with_its_own(
    prepare, tmp_path, monkeypatch
):
    """Both give the same bytes; each dataset says which made it, or which ones."""
    pytest.importorskip("gigatoken", reason="gigatoken is not installed")
    texts = [
        write(tmp_path / f"{i}.jsonl", [line(text) for text in (*TEXTS, str(i))]) for i in range(2)
    ]
    said: list[str] = []
    for shard, engine in (((1, 2), "hf"), ((0, 2), "auto")):
        prepare(texts, engine=engine, shard=shard, say=said.append)
    assert len(said) == 1
    assert said[0].startswith("engine gigatoken: it is installed and was shown")
    whole = prepare(texts, "whole", engine="hf")
    merged = merge([tmp_path / "out"], tmp_path / "merged")
    assert re.fullmatch(r"gigatoken 0\.10\.\d+, hf", merged.engine)
    assert merged == replace(whole, folder=merged.folder, engine=merged.engine)
    both = [whole.folder, merged.folder]
    assert merge(both, tmp_path / "both", allow_duplicates=True).engine == merged.engine

    text = write(tmp_path / "broken.jsonl", [*map(line, TEXTS), "no document"])
    monkeypatch.setattr(journal, "SAVE_EVERY_S", 0.0)
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 10)
    monkeypatch.setattr(blocks, "_READ_BYTES", 10)
    with pytest.raises(BrokenLineError):
        prepare(text, "half")
    with pytest.raises(ValueError, match="holds an unfinished run with other engine"):
        prepare(text, "half", engine="hf", max_errors=1)
    prepare(text, "half", max_errors=1)


@pytest.mark.usefixtures("few_points")
def test_gigatoken_itself_gives_the_same_ids(tokenizer, tmp_path, monkeypatch):
    pytest.importorskip("gigatoken", reason="gigatoken is not installed")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    encode = fast_engine.fast_engine(tokenizer, special_tokens=True)
    assert_ids(encode(TEXTS), [tokenizer.tokenizer.encode(text).ids for text in TEXTS])
