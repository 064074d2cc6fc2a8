"""The tokenizer: exact size, exact round trip, and the same ids as transformers and Megatron."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from text_files import line
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from megatron_infoentropy.data.blocks import BrokenLineError
from megatron_infoentropy.data.tokenizer import (
    END_OF_TEXT,
    load_tokenizer,
    train_tokenizer,
)

TEXTS = [
    "",
    " ",
    "def f(x):\n    return x ** 2\n",
    "  leading, trailing, inner   runs \t\r\n\n",
    "gr\u00fc\u00df dich, \u4f60\u597d, \U0001f600, e\u0301, \u2028, \x00, \ufffd, \ufeff",
    "\ua7cf and \U00016ecf, newer than some Unicode tables",
    "it's I'll WE'RE",
    "x" * 5000,
    f"a {END_OF_TEXT} b",
    f"{END_OF_TEXT}{END_OF_TEXT}\n{END_OF_TEXT} ",
    "<|endoftext| >",
]


@pytest.fixture(scope="module")
def reference(tokenizer_folder):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        return AutoTokenizer.from_pretrained(tokenizer_folder)


def test_transformers_and_megatron_find_what_they_need(tokenizer, reference, tokenizer_folder):
    from megatron.core.tokenizers.text.libraries.huggingface_tokenizer import HuggingFaceTokenizer

    assert len(reference) == tokenizer.vocab_size == 600
    assert reference.eos_token_id == reference.bos_token_id == tokenizer.eod_id
    assert reference.all_special_tokens == [END_OF_TEXT]
    # Megatron would take the ends of documents out of the loss if they were padding.
    assert reference.pad_token is None
    megatron = HuggingFaceTokenizer(str(tokenizer_folder))
    assert (megatron.vocab_size, megatron.eod) == (600, tokenizer.eod_id)
    assert megatron.text_to_ids(TEXTS[2]) == tokenizer.tokenizer.encode(TEXTS[2]).ids


def test_training_gives_the_same_bytes_in_another_process(
    training_text, tokenizer_folder, tmp_path
):
    program = (
        "from pathlib import Path; from megatron_infoentropy.data.tokenizer import train_tokenizer;"
        f"train_tokenizer(Path({str(training_text)!r}), Path({str(tmp_path / 'again')!r}),"
        " vocab_size=600)"
    )
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONHASHSEED": "7"}
    subprocess.run([sys.executable, "-c", program], check=True, cwd=root, env=environment)
    for path in tokenizer_folder.iterdir():
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes()


def test_files_are_trained_on_together(training_text, write_lines):
    plain = write_lines("plain.jsonl", [line("only bytes")])
    with pytest.raises(ValueError, match=r"the corpus supports a vocabulary of 2.. tokens"):
        train_tokenizer(plain, plain.with_name("out"), vocab_size=600)
    both = train_tokenizer([plain, training_text], plain.with_name("out"), vocab_size=600)
    assert both.vocab_size == 600


def test_every_byte_has_a_token_even_if_the_corpus_lacks_it(tokenizer):
    text = "".join(map(chr, range(0x80, 0x800))) + "\U0010ffff"
    ids = tokenizer.tokenizer.encode(text).ids
    assert tokenizer.tokenizer.decode(ids) == text


def test_errors_leave_no_folder(write_lines, tmp_path):
    text = write_lines("a.jsonl.zst", [line("a"), "{"])
    with pytest.raises(ValueError, match=r"at least 257 .* got 256"):
        train_tokenizer(text, tmp_path / "out", vocab_size=256)
    with pytest.raises(BrokenLineError, match=r"a\.jsonl\.zst:2: not JSON"):
        train_tokenizer(text, tmp_path / "out", vocab_size=300)
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl.zst"]


def save(tokenizer: Tokenizer, folder: Path, config: dict[str, object]) -> Path:
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def test_saved_truncation_and_padding_do_not_cut_documents(tokenizer_folder, tmp_path):
    tokenizer = Tokenizer.from_file(str(tokenizer_folder / "tokenizer.json"))
    whole = tokenizer.encode(TEXTS[2]).ids
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=4)
    folder = save(tokenizer, tmp_path / "cutting", {"eos_token": END_OF_TEXT})
    found = load_tokenizer(folder).tokenizer.encode_batch_fast([TEXTS[2], "a"])
    assert found[0].ids == whole == AutoTokenizer.from_pretrained(folder)(TEXTS[2]).input_ids
    assert len(found[1].ids) == 1


def test_the_end_of_document_token_is_found_in_both_spellings(tokenizer_folder, tmp_path):
    tokenizer = Tokenizer.from_file(str(tokenizer_folder / "tokenizer.json"))
    tokenizer.add_special_tokens(["<end>"])
    spelled = {"__type": "AddedToken", "content": "<end>"}
    named = save(tokenizer, tmp_path / "named", {"eos_token": spelled})
    loaded = load_tokenizer(named)
    assert (loaded.eod_id, loaded.vocab_size) == (600, 601)
    with pytest.raises(ValueError, match="is no tokenizer folder"):
        load_tokenizer(tmp_path)
