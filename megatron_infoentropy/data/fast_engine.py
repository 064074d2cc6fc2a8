"""A much faster engine, gigatoken, held to the ids of the reference engine.

It is given strings, never files (its own reader loses documents after a bad record). What it was
not seen to treat alike is encoded by the reference engine: documents with a character that the two
were found to cut differently (below), with a rare one that was not tried, or with the
spelling of a special token. And one document in 512 is encoded by both; a difference ends the run.

Which code points those are is found out by a calibration. A byte-level BPE first cuts a text at
places that depend on nothing but the classes of its characters (letter, digit, space, other), then
merges bytes within the pieces. Engines differ in their Unicode tables: a letter that is newer than
one of them is no letter there. The ids of a real vocabulary hide most such differences, as most
pieces with rare characters do not merge across the cut anyway. So both engines get a tokenizer of
our own: the same cuts, but a vocabulary whose merges join every character with its neighbours
unless there is a cut between.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer, pre_tokenizers

from megatron_infoentropy.data.indexed import Integers
from megatron_infoentropy.data.tokenizer import Engine, LoadedTokenizer, hf_engine
from megatron_infoentropy.files import write_whole

ENGINES = ("auto", "hf", "gigatoken")
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
    """The same, tried once for a way of cutting text and the versions of both engines."""
    content = json.loads(tokenizer_json)
    require_comparable(content)
    sha256 = hashlib.sha256(json.dumps(probe_tokenizer(content)).encode()).hexdigest()
    name = f"{sha256}-{version('tokenizers')}-{version('gigatoken')}.json"
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    path = Path(home) / "infoentropy" / "gigatoken" / name
    if path.is_file():
        points: list[int] = json.loads(path.read_text(encoding="utf-8"))
        return points
    points = disagreements(tokenizer_json, load)
    with suppress(OSError):  # a home that cannot be written to: then it is tried each time
        write_whole(path, json.dumps(points))
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
            f"gigatoken can not be shown to be exact for this tokenizer: {wrong[0]}"
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


CHECK_EVERY = 512  # documents
_MOST_SPELLINGS = 16
# Characters after which the library is loaded anew: its memory of words only grows, and version
# 0.10 lets no Python program set a limit.
_REFRESH_AFTER = 1 << 27


def choose_engine(asked: str, loaded: LoadedTokenizer, *, special_tokens: bool) -> tuple[str, str]:
    """Return hf or gigatoken for one of `ENGINES`, and why, as a sentence.

    Raises:
        InexactEngineError: gigatoken is asked for, but not installed or not shown to be exact.
        ValueError: there is no such engine.
    """
    if asked not in ENGINES:
        raise ValueError(f"the engine must be one of {', '.join(ENGINES)}, got {asked!r}")
    if asked == "hf":
        return "hf", "it was asked for"
    try:
        fast_engine(loaded, special_tokens=special_tokens)
    except InexactEngineError as error:
        if asked == "gigatoken":
            raise InexactEngineError(f"{error}; use --engine hf") from error
        return "hf", str(error)
    return "gigatoken", "it is installed and was shown to give the ids of hf for this tokenizer"


def fast_engine(loaded: LoadedTokenizer, *, special_tokens: bool) -> Engine:
    """Return the exact combination of gigatoken and the reference engine for a tokenizer.

    Raises:
        InexactEngineError: it is not installed, or exactness can not be shown.
    """
    _require_gigatoken()
    content = loaded.tokenizer.to_str()
    points = cached_disagreements(content, load_gigatoken)
    return exact_engine(
        _refreshed(content, load_gigatoken), loaded, points, special_tokens=special_tokens
    )


def _require_gigatoken() -> None:
    try:
        import_module("gigatoken")
    except ImportError as error:
        raise InexactEngineError(
            "gigatoken, which is many times as fast, is not installed (pip install gigatoken)"
        ) from error


def load_gigatoken(content: str) -> Engine:
    """The engine alone, from the content of a tokenizer.json."""
    tokenizer: Any = import_module("gigatoken").Tokenizer.from_json(content)

    def encode(texts: Sequence[str]) -> tuple[Integers, npt.NDArray[np.int64]]:
        rows = tokenizer.encode_batch(list(texts), parallel=False).layout
        offsets = np.asarray(rows.offsets.data)
        tokens = np.asarray(rows.content.data)[offsets[0] : offsets[-1]]
        return tokens.astype(np.int32), np.diff(offsets).astype(np.int64)

    return encode


def exact_engine(
    fast: Engine, loaded: LoadedTokenizer, points: Sequence[int], *, special_tokens: bool
) -> Engine:
    """`fast` where it may be trusted, the reference engine elsewhere.

    `points` are the code points that the two treat differently.
    """
    exact = hf_engine(loaded, special_tokens=False)
    before, behind = _added_around(loaded) if special_tokens else ([], [])
    spellings = _spellings(loaded)
    doubtful = doubtful_characters(points)
    seen = 0

    def may_be_trusted(text: str) -> bool:
        if any(spelling in text for spelling in spellings):
            return False
        # A lookup per character: a pattern of thousands of characters is slower than encoding.
        return text.isascii() or not doubtful[np.frombuffer(text.encode("utf-32-le"), "<u4")].any()

    def encode(texts: Sequence[str]) -> tuple[Integers, npt.NDArray[np.int64]]:
        nonlocal seen
        trusted = [may_be_trusted(text) for text in texts]
        chosen = [text for text, trust in zip(texts, trusted, strict=True) if trust]
        tokens, lengths = fast(chosen)
        _compare(exact, chosen, -seen % CHECK_EVERY, tokens, lengths)
        seen += len(chosen)
        if len(chosen) < len(texts):
            others = [text for text, trust in zip(texts, trusted, strict=True) if not trust]
            tokens, lengths = interleave(trusted, (tokens, lengths), exact(others))
        return wrap(tokens, lengths, before, behind)

    return encode


def doubtful_characters(points: Sequence[int]) -> npt.NDArray[np.bool_]:
    """True for those code points, and for all that were not tried, [0x110000]."""
    table = np.zeros(0x110000, dtype=np.bool_)
    table[list(points)] = True
    table[LAST_TRIED + 1 :] = True
    return table


def interleave(
    first: Sequence[bool],
    ours: tuple[Integers, npt.NDArray[np.int64]],
    theirs: tuple[Integers, npt.NDArray[np.int64]],
) -> tuple[Integers, npt.NDArray[np.int64]]:
    """Documents of two results in one order: `first` tells for each whether it is in `ours`."""
    mask = np.array(first, dtype=bool)
    lengths = np.empty(mask.size, dtype=np.int64)
    lengths[mask], lengths[~mask] = ours[1], theirs[1]
    of_ours = np.repeat(mask, lengths)
    tokens = np.empty(of_ours.size, dtype=np.int32)
    tokens[of_ours], tokens[~of_ours] = ours[0], theirs[0]
    return tokens, lengths


def wrap(
    tokens: Integers,
    lengths: npt.NDArray[np.int64],
    before: Sequence[int],
    behind: Sequence[int],
) -> tuple[Integers, npt.NDArray[np.int64]]:
    """Put ids before and behind every document, also those without any."""
    more = len(before) + len(behind)
    if not more:
        return tokens, lengths
    ends = np.cumsum(lengths)
    at = np.stack([*[ends - lengths] * len(before), *[ends] * len(behind)], axis=1).ravel()
    return np.insert(tokens, at, [*before, *behind] * lengths.size), lengths + more


def _added_around(loaded: LoadedTokenizer) -> tuple[list[int], list[int]]:
    added = loaded.added_around()
    if added is None:
        raise InexactEngineError(
            "gigatoken can not be shown to be exact: the tokenizer changes ids where it adds "
            "special tokens"
        )
    return added


def _spellings(loaded: LoadedTokenizer) -> list[str]:
    """Texts that every special token contains one of."""
    added = [token.content for token in loaded.tokenizer.get_added_tokens_decoder().values()]
    if len(added) <= _MOST_SPELLINGS:
        return added
    common = added[0]
    for other in added:
        while not other.startswith(common):
            common = common[:-1]
    if len(common) < 2:
        raise InexactEngineError(
            f"gigatoken would be slow: {len(added)} added tokens without a common start"
        )
    return [common]


def _compare(
    exact: Engine,
    texts: Sequence[str],
    first: int,
    tokens: Integers,
    lengths: npt.NDArray[np.int64],
) -> None:
    """Encode every `CHECK_EVERY`-th text from number `first` on by the reference engine too."""
    ends = np.cumsum(lengths)
    for document in range(first, len(texts), CHECK_EVERY):
        text = texts[document]
        found = tokens[ends[document] - lengths[document] : ends[document]]
        expected, _ = exact([text])
        if not np.array_equal(found, expected):
            raise InexactEngineError(
                f"the fast engine gives other ids than the reference engine for {text[:80]!r}; "
                "start again with --engine hf --restart"
            )


def _refreshed(content: str, load: LoadEngine) -> Engine:
    """An engine that is loaded anew from time to time, to forget what it remembers."""
    engine, left = load(content), _REFRESH_AFTER

    def encode(texts: Sequence[str]) -> tuple[Integers, npt.NDArray[np.int64]]:
        nonlocal engine, left
        left -= sum(map(len, texts))
        if left < 0:
            engine, left = load(content), _REFRESH_AFTER
        return engine(texts)

    return encode
