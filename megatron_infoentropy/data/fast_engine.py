"""A much faster engine, gigatoken, held to the ids of the reference engine.

It is given strings, never files (its own reader loses documents after a bad record). What it was
not seen to treat alike is encoded by the reference engine: documents with a character that the two
were found to cut differently (see `calibrate.py`), with a rare one that was not tried, or with the
spelling of a special token. And one document in 512 is encoded by both; a difference ends the run.
"""

from collections.abc import Sequence
from importlib import import_module
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_infoentropy.data.calibrate import (
    LAST_TRIED,
    InexactEngineError,
    LoadEngine,
    cached_disagreements,
)
from megatron_infoentropy.data.engine import Engine, hf_engine
from megatron_infoentropy.data.indexed import Integers
from megatron_infoentropy.data.tokenizer import LoadedTokenizer

CHECK_EVERY = 512  # documents
_MOST_SPELLINGS = 16
# Characters after which the library is loaded anew: its memory of words only grows, and version
# 0.10 lets no Python program set a limit.
_REFRESH_AFTER = 1 << 27


def fast_engine(loaded: LoadedTokenizer, *, special_tokens: bool) -> Engine:
    """Return the exact combination of gigatoken and the reference engine for a tokenizer.

    Raises:
        InexactEngineError: it is not installed, or exactness can not be shown.
    """
    require_gigatoken()
    content = loaded.tokenizer.to_str()
    points = cached_disagreements(content, load_gigatoken)
    return exact_engine(
        _refreshed(content, load_gigatoken), loaded, points, special_tokens=special_tokens
    )


def require_gigatoken() -> None:
    """Check that the package is there.

    Raises:
        InexactEngineError: it is not.
    """
    try:
        import_module("gigatoken")
    except ImportError as error:
        raise InexactEngineError(
            "--engine gigatoken needs the package of that name: "
            'pip install "megatron-infoentropy[gigatoken]"; or use --engine hf'
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
            "the fast engine can not be shown to be exact: the tokenizer changes ids where it adds "
            "special tokens; use --engine hf"
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
            f"the fast engine would be slow: {len(added)} added tokens without a common start; "
            "use --engine hf"
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
