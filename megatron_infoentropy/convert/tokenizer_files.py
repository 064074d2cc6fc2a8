"""The tokenizer that goes with an exported model: its files, and what config.json says of it."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

_NAMES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
)
_GENERATION = "generation_config.json"
_PROBE = "They've 1234 (or 5,678):\n\n\tx += '\xe9t\xe9'  # \u6f22\u5b57 e\u0301 IT'S <b>\r\n  end "


@dataclass(frozen=True)
class TokenizerFacts:
    """The files of a tokenizer, its number of tokens, and the ids of its special ones."""

    files: tuple[Path, ...]
    vocab_size: int
    ids: dict[str, int]  # bos_token_id, eos_token_id, pad_token_id, as far as there are
    generation: dict[str, Any]  # generation_config.json of the folder, with these ids


def read_tokenizer(folder: Path) -> TokenizerFacts:
    """Look at a Hugging Face tokenizer folder.

    Raises:
        ValueError: there is no tokenizer.json in it.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise ValueError(f"expected {folder} to be a tokenizer folder; it has no tokenizer.json")
    tokenizer = Tokenizer.from_file(str(path))
    return TokenizerFacts(
        files=tuple(folder / name for name in _NAMES if (folder / name).is_file()),
        # The highest id counts, not the number of tokens: a vocabulary may have holes.
        vocab_size=max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1,
        ids=(ids := _special_ids(folder / "tokenizer_config.json", tokenizer)),
        generation=_read_json(folder / _GENERATION) | ids,
    )


def copy_tokenizer(tokenizer: TokenizerFacts, folder: Path) -> None:
    """Copy the files as they are: rewriting them is where tokenizers lose their settings."""
    for file in tokenizer.files:
        shutil.copyfile(file, folder / file.name)


def _read_json(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    return content


def _special_ids(path: Path, tokenizer: Tokenizer) -> dict[str, int]:
    config = _read_json(path)
    ids = {}
    for name in ("bos_token", "eos_token", "pad_token"):
        token = config.get(name)
        text = token.get("content") if isinstance(token, dict) else token
        token_id = None if text is None else tokenizer.token_to_id(text)
        if token_id is not None:
            ids[name + "_id"] = token_id
    return ids


def tokenizer_differences(folder: Path) -> list[str]:
    """Load a folder's tokenizer as transformers does and compare it with tokenizer.json.

    Id by id, and by how text is cut: for some models transformers has rules of its own, and
    ignores those of the file. Returns one line for every kind of difference; none where there is
    no tokenizer.
    """
    from transformers import AutoTokenizer

    if not (folder / "tokenizer.json").is_file():
        return []
    stored = Tokenizer.from_file(str(folder / "tokenizer.json"))
    used = AutoTokenizer.from_pretrained(
        str(folder), local_files_only=True, trust_remote_code=False
    )
    written, loaded = stored.get_vocab(with_added_tokens=True), used.get_vocab()
    other = [token for token in written if loaded.get(token) != written[token]]
    more = [token for token in loaded if token not in written]
    differences = [
        f"{len(tokens)} tokens {what}, first {tokens[0]!r}"
        for what, tokens in (("have another id in transformers", other), ("are not stored", more))
        if tokens
    ]
    cut = stored.encode(_PROBE, add_special_tokens=False).ids
    if not differences and used.encode(_PROBE, add_special_tokens=False) != cut:
        differences.append(
            f"transformers loads a {type(used).__name__}, which cuts text in another way than "
            "tokenizer.json; --no-verify exports all the same, for programs that read the file"
        )
    return differences
