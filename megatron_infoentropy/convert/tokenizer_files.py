"""The tokenizer that goes with an exported model: its files, and what config.json says of it."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_infoentropy.convert.checkpoint import read_object
from megatron_infoentropy.data.tokenizer import CONFIG, load_with_transformers

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
_MORE_TEMPLATES = "additional_chat_templates"  # a folder of them, each a .jinja file
_GENERATION = "generation_config.json"


@dataclass(frozen=True)
class TokenizerFacts:
    """The files of a tokenizer, its number of tokens, and the ids of its special ones."""

    folder: Path
    files: tuple[Path, ...]  # in the folder
    vocab_size: int
    ids: dict[str, int]  # bos_token_id, eos_token_id, pad_token_id, as far as there are
    generation: dict[str, Any]  # generation_config.json of the folder, completed by these ids


def read_tokenizer(folder: Path) -> TokenizerFacts:
    """Look at a Hugging Face tokenizer folder, as transformers loads it.

    Raises:
        ValueError: there is no tokenizer.json in it, or one of its files is damaged.
    """
    used = load_with_transformers(folder)
    ids = _special_ids(used)
    return TokenizerFacts(
        folder=folder,
        files=tuple(name for name in _names(folder) if (folder / name).is_file()),
        # The highest id counts, not the number of tokens: a vocabulary may have holes.
        vocab_size=max(used.get_vocab().values()) + 1,
        ids=ids,
        generation=_generation(folder, ids),
    )


def copy_tokenizer(
    tokenizer: TokenizerFacts, folder: Path, tokenizer_class: str | None = None
) -> None:
    """Copy the files as they are: rewriting them is where tokenizers lose their settings.

    tokenizer_class: name it in tokenizer_config.json, without which ids would change here.
    """
    for file in tokenizer.files:
        (folder / file).parent.mkdir(exist_ok=True)
        shutil.copyfile(tokenizer.folder / file, folder / file)
    if tokenizer_class:
        settings = read_object(folder / CONFIG) | {"tokenizer_class": tokenizer_class}
        text = json.dumps(settings, indent=2, ensure_ascii=False) + "\n"
        (folder / CONFIG).write_text(text, encoding="utf-8")


def _names(folder: Path) -> list[Path]:
    templates = sorted((folder / _MORE_TEMPLATES).glob("*.jinja"))
    return [*map(Path, _NAMES), *(path.relative_to(folder) for path in templates)]


def _special_ids(used: Any) -> dict[str, int]:
    ids = {name: getattr(used, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    return {name: int(token) for name, token in ids.items() if token is not None}


def _generation(folder: Path, ids: dict[str, int]) -> dict[str, Any]:
    """Return how to generate: what the folder says, and that the tokenizer's end is an end too."""
    settings = read_object(folder / _GENERATION)
    said = {name: value for name, value in settings.items() if value is not None}
    ends = said.get("eos_token_id", [])
    ends = ends if isinstance(ends, list) else [ends]
    if not all(isinstance(end, int) and end >= 0 for end in ends):
        raise ValueError(
            f"expected token ids as eos_token_id in {folder / _GENERATION}, got {ends!r:.60}"
        )
    own = ids.get("eos_token_id")
    ends = ends if own is None or own in ends else [*ends, own]
    return settings | ids | said | ({"eos_token_id": ends if ends[1:] else ends[0]} if ends else {})
