"""The digest of a tokenizer folder: changes with the ids and with nothing else."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_infoentropy.data.tokenizer import tokenizer_digest


@pytest.fixture
def folder(tokenizer_folder, tmp_path):
    return Path(shutil.copytree(tokenizer_folder, tmp_path / "tokenizer"))


def changed(path: Path, change: Callable[[dict[str, Any]], object], **how: Any) -> None:
    content = json.loads(path.read_text()) if path.is_file() else {}
    change(content)
    path.write_text(json.dumps(content, **how))


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("tokenizer_config.json", {"eos_token": "a"}),
        ("tokenizer_config.json", {"tokenizer_class": "Qwen2Tokenizer"}),
        ("tokenizer_config.json", {"add_prefix_space": True}),
        ("tokenizer_config.json", {"split_special_tokens": True}),
        ("tokenizer_config.json", {"a setting that nobody knows": 1}),
        ("special_tokens_map.json", {"bos_token": "<s>"}),
        ("added_tokens.json", {"<s>": 600}),
        ("tokenizer.json", {"normalizer": {"type": "NFC"}}),
    ],
)
def test_what_changes_ids_changes_the_digest(folder, name, change):
    before = tokenizer_digest(folder)
    changed(folder / name, lambda content: content.update(change))
    assert tokenizer_digest(folder) != before


def test_what_changes_no_id_does_not(folder):
    before = tokenizer_digest(folder)
    changed(folder / "tokenizer.json", lambda content: content.update(truncation={"max_length": 4}))
    settings = {"chat_template": "x", "model_max_length": 9, "pad_token": None, "is_local": True}
    settings["tokenizer_class"] = "TokenizersBackend"  # as transformers 5 calls the generic one
    changed(folder / "tokenizer_config.json", lambda content: content.update(settings), indent=7)
    (folder / "chat_template.jinja").write_text("x")
    (folder / "config.json").write_text('{"model_type": "llama"}')
    assert tokenizer_digest(folder) == before


def test_files_that_transformers_leaves_alone_do_not(folder):
    """It reads special_tokens_map.json and added_tokens.json only for want of this setting."""
    decoder = {"added_tokens_decoder": {"0": {"content": "<|endoftext|>"}}}
    changed(folder / "tokenizer_config.json", lambda content: content.update(decoder))
    before = tokenizer_digest(folder)
    (folder / "special_tokens_map.json").write_text('{"bos_token": "<s>"}')
    (folder / "added_tokens.json").write_text('{"<s>": 600}')
    assert tokenizer_digest(folder) == before


def test_another_file_that_is_read_instead_is_looked_at_too(folder):
    versions = {"fast_tokenizer_files": ["tokenizer.4.0.0.json"]}
    changed(folder / "tokenizer_config.json", lambda content: content.update(versions))
    shutil.copy(folder / "tokenizer.json", folder / "tokenizer.4.0.0.json")
    before = tokenizer_digest(folder)
    changed(folder / "tokenizer.4.0.0.json", lambda content: content.update(normalizer=None, a=1))
    assert tokenizer_digest(folder) != before
