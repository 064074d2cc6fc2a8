"""Texts to token ids by the reference engine, Hugging Face's `tokenizers`.

An engine is a function from texts to their ids: all ids in a row, and how many each text has. What
is done per token besides encoding is kept to two passes in C: out of the library, into the array.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import chain

import numpy as np
import numpy.typing as npt

from megatron_infoentropy.data.indexed import Integers
from megatron_infoentropy.data.tokenizer import LoadedTokenizer

Engine = Callable[[Sequence[str]], tuple[Integers, npt.NDArray[np.int64]]]

# Words whose ids are remembered. The library's own 10 000 are full of rare words after a few
# megabytes and are never replaced; ids do not depend on it.
_REMEMBERED_WORDS = 1 << 17
_TEXTS_AT_ONCE = 16  # an encoding takes some 150 bytes a token until its ids are taken out


def hf_engine(loaded: LoadedTokenizer, *, special_tokens: bool) -> Engine:
    """Encode as transformers and thus Megatron would, with or without start tokens and the like."""
    tokenizer = loaded.tokenizer
    if hasattr(tokenizer.model, "_resize_cache"):
        tokenizer.model._resize_cache(_REMEMBERED_WORDS)

    def encode(texts: Sequence[str]) -> tuple[Integers, npt.NDArray[np.int64]]:
        ids = list(_ids(texts))
        lengths = np.fromiter(map(len, ids), dtype=np.int64, count=len(ids))
        tokens = np.fromiter(chain.from_iterable(ids), dtype=np.int32, count=int(lengths.sum()))
        return tokens, lengths

    def _ids(texts: Sequence[str]) -> Iterator[list[int]]:
        for first in range(0, len(texts), _TEXTS_AT_ONCE):
            some = texts[first : first + _TEXTS_AT_ONCE]
            encodings = tokenizer.encode_batch_fast(some, add_special_tokens=special_tokens)
            yield from [encoding.ids for encoding in encodings]

    return encode


def end_documents(
    tokens: Integers, lengths: npt.NDArray[np.int64], eod_id: int
) -> tuple[Integers, npt.NDArray[np.int64]]:
    """Append `eod_id` to every document that has a token, as Megatron's tool does."""
    filled = lengths > 0
    ends = np.cumsum(lengths)[filled]
    return np.insert(tokens, ends, eod_id), lengths + filled
