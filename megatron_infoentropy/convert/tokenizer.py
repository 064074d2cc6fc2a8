"""The tokenizer beside an exported model: its files, its special ids, and whether ids stay.

The ids of the training data are those that transformers makes of the tokenizer's own folder. Beside
a model it may have other rules: in a Qwen2 folder always, elsewhere where tokenizer_config.json
names no class and the model's is not the generic one.
"""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tokenizers import Tokenizer

from megatron_infoentropy.convert.checkpoint import read_object
from megatron_infoentropy.data.tokenizer import (
    CONFIG,
    GENERIC_CLASSES,
    TOKENIZER,
    load_with_transformers,
)

_GIVE_IDS = (TOKENIZER, "special_tokens_map.json", "added_tokens.json")
_NAMES = (
    *_GIVE_IDS,
    CONFIG,
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
)
_MORE_TEMPLATES = "additional_chat_templates"  # a folder of them, each a .jinja file
_GENERATION = "generation_config.json"
_PROBE = "They've 1234 (or 5,678):\n\n\tx += '\xe9t\xe9'  # \u6f22\u5b57 e\u0301 IT'S <b>\r\n  end "


@dataclass(frozen=True)
class TokenizerFolder:
    """The files of a tokenizer, its number of tokens, and the ids of its special ones."""

    folder: Path
    files: tuple[Path, ...]  # in the folder
    vocab_size: int
    ids: dict[str, int]  # bos_token_id, eos_token_id, pad_token_id, as far as there are
    generation: dict[str, Any]  # generation_config.json of the folder, completed by these ids


def read_tokenizer(folder: Path) -> TokenizerFolder:
    """Look at a Hugging Face tokenizer folder, as transformers loads it."""
    used = load_with_transformers(folder)
    ids = {name: getattr(used, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    ids = {name: int(token) for name, token in ids.items() if token is not None}
    templates = sorted((folder / _MORE_TEMPLATES).glob("*.jinja"))
    names = [*map(Path, _NAMES), *(path.relative_to(folder) for path in templates)]
    return TokenizerFolder(
        folder=folder,
        files=tuple(name for name in names if (folder / name).is_file()),
        vocab_size=_size(used),
        ids=ids,
        generation=_generation(folder, ids),
    )


def copy_tokenizer(
    tokenizer: TokenizerFolder, folder: Path, tokenizer_class: str | None = None
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


def _size(used: Any) -> int:
    """Return the highest id and 1, not the number of tokens: a vocabulary may have holes."""
    return int(max(used.get_vocab().values())) + 1


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


def cuts_as_qwen2(folder: Path) -> bool:
    """Say whether a tokenizer's ids stay the same beside a Qwen2 model."""
    return not _differences(load_with_transformers(folder), _load_beside(folder, "qwen2"))


def class_to_name(folder: Path, model_type: str) -> str | None:
    """Return the class that tokenizer_config.json must name beside a model, so that ids stay.

    None where it is right as it is, or where no name helps: then the proof of the export tells.
    """
    here = load_with_transformers(folder)
    own = type(here).__name__
    for name in (None, GENERIC_CLASSES[1] if own in GENERIC_CLASSES else own):
        beside = (_load_beside(folder, kind, name) for kind in (None, model_type))
        if not any(_differences(here, other) for other in beside):
            return name
    return None


def tokenizer_differences(folder: Path) -> list[str]:
    """Compare a model folder's tokenizer with what its files alone are to transformers.

    Id by id, by how text is cut, and with the model's rows. Returns one line for every kind of
    difference; none where there is no tokenizer.
    """
    if not (folder / TOKENIZER).is_file():
        return []
    used = load_with_transformers(folder)
    config = read_object(folder / "config.json")
    lines = _differences(_load_beside(folder, None), used)
    if lines:
        lines[-1] += f"; beside this model transformers takes its {type(used).__name__}"
        if config.get("model_type") == "qwen2":  # whatever is named
            lines[-1] += ": --family llama exports another class"
    elif (tokens := _size(used)) > (rows := config.get("vocab_size", tokens)):
        lines = [f"it has {tokens} tokens, the model {rows} rows"]
    return [f"tokenizer: {line}" for line in lines]


def _load_beside(folder: Path, model_type: str | None, tokenizer_class: str | None = None) -> Any:
    """Load a tokenizer's files as they would be beside a model of a type, or beside none."""
    with TemporaryDirectory() as name:
        place = Path(name)
        for file in _GIVE_IDS:
            if (folder / file).is_file():
                (place / file).symlink_to((folder / file).resolve())
        settings = read_object(folder / CONFIG)
        if tokenizer_class:
            settings["tokenizer_class"] = tokenizer_class
        (place / CONFIG).write_text(json.dumps(settings), encoding="utf-8")
        if model_type:
            config = json.dumps({"model_type": model_type})
            (place / "config.json").write_text(config, encoding="utf-8")
        return load_with_transformers(place)


def _differences(one: Any, other: Any) -> list[str]:
    """Return a line for every way in which two of transformers' tokenizers give other ids."""
    expected, found = one.get_vocab(), other.get_vocab()
    moved = [token for token in expected if found.get(token) != expected[token]]
    more = [token for token in found if token not in expected]
    lines = [
        f"{len(tokens)} tokens {what}, first {tokens[0]!r}"
        for what, tokens in (("have another id", moved), ("are added", more))
        if tokens
    ]
    text = None if lines else _first_cut_otherwise(one.backend_tokenizer, other.backend_tokenizer)
    return lines if text is None else [f"{text!r} is cut in another way than in training"]


def _first_cut_otherwise(one: Tokenizer, other: Tokenizer) -> str | None:
    """Return a text that two tokenizers of one vocabulary cut in different ways.

    Every token's own text is tried: one that the other's rules divide would show nowhere else.
    """
    for tokenizer in (one, other):
        tokenizer.no_truncation()
        tokenizer.no_padding()
    ids = sorted(one.get_vocab(with_added_tokens=True).values())
    own = one.decode_batch([[i] for i in ids], skip_special_tokens=False)
    texts = [*own, _PROBE, f" {_PROBE}{own[0]} {_PROBE}"]
    cuts = (t.encode_batch_fast(texts, add_special_tokens=True) for t in (one, other))
    pairs = zip(texts, *cuts, strict=True)
    return next((text for text, a, b in pairs if a.ids != b.ids), None)
