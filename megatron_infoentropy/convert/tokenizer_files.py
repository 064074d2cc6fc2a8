"""The tokenizer that goes with an exported model: its files, and what config.json says of it."""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from megatron_infoentropy.convert.json_file import read_object

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
        ValueError: there is no tokenizer.json in it, or one of its files is damaged.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise ValueError(f"expected {folder} to be a tokenizer folder; it has no tokenizer.json")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library has no narrower one
        raise ValueError(f"{path} is no tokenizer, or a damaged one: {error}") from None
    return TokenizerFacts(
        files=tuple(folder / name for name in _NAMES if (folder / name).is_file()),
        # The highest id counts, not the number of tokens: a vocabulary may have holes.
        vocab_size=max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1,
        ids=(ids := _special_ids(folder / "tokenizer_config.json", tokenizer)),
        generation=read_object(folder / _GENERATION) | ids,
    )


def copy_tokenizer(tokenizer: TokenizerFacts, folder: Path) -> None:
    """Copy the files as they are: rewriting them is where tokenizers lose their settings."""
    for file in tokenizer.files:
        shutil.copyfile(file, folder / file.name)


def _special_ids(path: Path, tokenizer: Tokenizer) -> dict[str, int]:
    config = read_object(path)
    ids = {}
    for name in ("bos_token", "eos_token", "pad_token"):
        token = config.get(name)
        text = token.get("content") if isinstance(token, dict) else token
        token_id = tokenizer.token_to_id(text) if isinstance(text, str) else None
        if token_id is not None:
            ids[name + "_id"] = token_id
    return ids
