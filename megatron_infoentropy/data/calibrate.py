"""Where a faster engine may not be trusted: which code points it splits from other text otherwise.

A byte-level BPE first cuts a text at places that depend on nothing but the classes of its
characters (letter, digit, space, other), then merges bytes within the pieces. Engines differ in
their Unicode tables: a letter that is newer than one of them is no letter there. The ids of a real
vocabulary hide most such differences, as most pieces with rare characters do not merge across the
cut anyway. So both engines get a tokenizer of our own: the same cuts, but a vocabulary whose merges
join every character with its neighbours unless there is a cut between.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, pre_tokenizers

from megatron_infoentropy.data.engine import Engine
from megatron_infoentropy.data.folder import write_synced

LoadEngine = Callable[[str], Engine]  # from the content of a tokenizer.json

# Beyond it there are tags and private characters: too rare to try, never left to the fast engine.
LAST_TRIED = 0x3FFFF
_NEIGHBOURS = "a1! '\n"
_AT_ONCE = 256
_SURROGATES = range(0xD800, 0xE000)


class InexactEngineError(ValueError):
    """An engine that can not be shown to give this tokenizer's ids."""


def disagreements(tokenizer_json: str, load: LoadEngine) -> list[int]:
    """Code points up to `LAST_TRIED` that `load`'s engine cuts otherwise than `tokenizers`.

    Raises:
        InexactEngineError: the tokenizer is of no kind that this shows anything about.
    """
    require_comparable(json.loads(tokenizer_json))
    probe = json.dumps(probe_tokenizer(json.loads(tokenizer_json)))
    ours = Tokenizer.from_str(probe)
    theirs = load(probe)
    tried = [point for point in range(LAST_TRIED + 1) if point not in _SURROGATES]
    found: list[int] = []
    for first in range(0, len(tried), _AT_ONCE):
        some = tried[first : first + _AT_ONCE]
        if not _agree(ours, theirs, ["".join(map(_context, some))]):
            found += [point for point in some if not _agree(ours, theirs, [_context(point)])]
    return found


def cached_disagreements(tokenizer_json: str, load: LoadEngine) -> list[int]:
    """The same, tried once for a tokenizer and the versions of both engines."""
    sha256 = hashlib.sha256(tokenizer_json.encode()).hexdigest()
    name = f"{sha256}-{version('tokenizers')}-{version('gigatoken')}.json"
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    path = Path(home) / "infoentropy" / "gigatoken" / name
    if path.is_file():
        points: list[int] = json.loads(path.read_text(encoding="utf-8"))
        return points
    points = disagreements(tokenizer_json, load)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_synced(path, json.dumps(points).encode())
    return points


def require_comparable(content: dict[str, Any]) -> None:
    """Check that ids depend on the cuts and on merges of bytes alone.

    Raises:
        InexactEngineError: with what else they depend on.
    """
    model = content["model"]
    cutters = content.get("pre_tokenizer") or {}
    steps = cutters.get("pretokenizers", [cutters])
    kinds = [step.get("type") for step in steps]
    reasons = {
        "its model is no BPE": model.get("type") != "BPE",
        "it falls back to bytes": bool(model.get("byte_fallback")),
        "it drops merges at random": bool(model.get("dropout")),
        "it marks parts of words": bool(
            model.get("continuing_subword_prefix") or model.get("end_of_word_suffix")
        ),
        "it normalizes texts": content.get("normalizer") is not None,
        "it is not byte-level": not kinds or kinds[-1] != "ByteLevel",
        "it splits in an unknown way": not set(kinds) <= {"Split", "Digits", "ByteLevel"},
        "it adds a space before texts": any(step.get("add_prefix_space") for step in steps),
    }
    wrong = [reason for reason, holds in reasons.items() if holds]
    if wrong:
        raise InexactEngineError(
            f"the fast engine can not be shown to be exact for this tokenizer: {wrong[0]}; "
            "use --engine hf"
        )


def probe_tokenizer(content: dict[str, Any]) -> dict[str, Any]:
    """A tokenizer with the same cuts, whose merges show between which characters they are."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    spelled = {character: _spell(character) for character in _NEIGHBOURS}
    starts, ends, ascii_letters = (
        list(map(_letter_of, bytes_))
        for bytes_ in (range(0xC2, 0xF5), range(0x80, 0xC0), range(0x80))
    )
    merges = [(spelled[k], start) for k in _NEIGHBOURS for start in (*starts, *ascii_letters)]
    merges += [(end, spelled[k]) for k in _NEIGHBOURS for end in (*ends, *ascii_letters)]
    merges += [(end, start) for end in ends for start in starts]
    merges = list(dict.fromkeys(merges))
    words = [*letters, *dict.fromkeys(left + right for left, right in merges)]
    model = {
        **content["model"],
        "vocab": {word: number for number, word in enumerate(words)},
        "merges": [list(merge) for merge in merges],
        "unk_token": None,
    }
    return {**content, "model": model, "added_tokens": [], "post_processor": None}


def _context(point: int) -> str:
    """A character between letters, digits, signs, spaces and itself."""
    c = chr(point)
    return f"a{c}a1{c}1!{c}! {c} {c}{c}b '{c}\n{c}\na"


def _agree(ours: Tokenizer, theirs: Engine, texts: Sequence[str]) -> bool:
    expected = [token for text in texts for token in ours.encode(text).ids]
    found, _ = theirs(texts)
    return bool(found.tolist() == expected)


def _spell(character: str) -> str:
    return "".join(_letter_of(byte) for byte in character.encode())


def _letters() -> Iterator[tuple[int, str]]:
    """Which letter stands for a byte: itself where it can be seen, else one from U+0100 on."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = 0
    for byte in range(256):
        if byte in visible:
            yield byte, chr(byte)
        else:
            yield byte, chr(0x100 + hidden)
            hidden += 1


_LETTERS = dict(_letters())


def _letter_of(byte: int) -> str:
    return _LETTERS[byte]
