"""Whether transformers makes the same ids of a tokenizer's files beside the exported model.

The ids of the training data are those that it makes of the tokenizer's own folder. Beside a model
it may have other rules: in a Qwen2 folder always, elsewhere where tokenizer_config.json names no
class and the model's is not the generic one.
"""

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tokenizers import Tokenizer

from megatron_infoentropy.data.tokenizer import (
    CONFIG,
    GENERIC_CLASSES,
    TOKENIZER,
    load_with_transformers,
    read_json,
)

_FILES = (TOKENIZER, "special_tokens_map.json", "added_tokens.json")
_PROBE = "They've 1234 (or 5,678):\n\n\tx += '\xe9t\xe9'  # \u6f22\u5b57 e\u0301 IT'S <b>\r\n  end "


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

    Id by id, and by how text is cut. Returns one line for every kind of difference; none where
    there is no tokenizer.
    """
    if not (folder / TOKENIZER).is_file():
        return []
    used = load_with_transformers(folder)
    differences = _differences(_load_beside(folder, None), used)
    if differences:
        advice = f"beside this model transformers takes its {type(used).__name__}"
        if read_json(folder / "config.json").get("model_type") == "qwen2":  # whatever is named
            advice += ": --family llama exports another class"
        differences[-1] += f"; {advice}"
    return differences


def _load_beside(folder: Path, model_type: str | None, tokenizer_class: str | None = None) -> Any:
    """Load a tokenizer's files as they would be beside a model of a type, or beside none."""
    with TemporaryDirectory() as name:
        place = Path(name)
        for file in _FILES:
            if (folder / file).is_file():
                (place / file).symlink_to((folder / file).resolve())
        settings = read_json(folder / CONFIG) if (folder / CONFIG).is_file() else {}
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
