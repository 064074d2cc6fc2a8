"""One short passage of the data, token by token, the same for every model that scores the data."""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from megatron_infoentropy.data.tokenizer import TOKENIZER
from megatron_infoentropy.evaluate.dataset import TokenDataset
from megatron_infoentropy.evaluate.selection import Selection

_TOKENS = 256


def passage(
    dataset: TokenDataset, selection: Selection, scores: NDArray[np.float16], tokenizer: Path
) -> dict[str, Any]:
    """The start of the first document of 256 tokens, or of the longest one; see `evaluation`.

    scores: of every selected token, [tokens, 2].
    tokenizer: the folder of the tokenizer that the ids belong to.
    """
    row = int(np.argmax(np.minimum(selection.length, _TOKENS)))
    length = min(int(selection.length[row]), _TOKENS)
    first = int(selection.length[:row].sum())
    domain = dataset.domains[selection.domain[row]]
    tokens = domain.read(int(selection.document[row]), 0, length)
    ce, entropy = np.round(scores[first : first + length].astype(np.float64), 4).T
    return {
        "domain": domain.name,
        "document": int(selection.document[row]),
        "start": 0,
        "text": _pieces(Tokenizer.from_file(str(tokenizer / TOKENIZER)), tokens.tolist()),
        "ce": ce.tolist(),
        "entropy": entropy.tolist(),
    }


def _pieces(tokenizer: Tokenizer, tokens: list[int]) -> list[str]:
    """What each token adds to the text; a token that ends inside a character adds nothing yet."""
    pieces: list[str] = []
    shown = ""
    for count in range(1, len(tokens) + 1):
        text = tokenizer.decode(tokens[:count], skip_special_tokens=False)
        whole = text.rstrip("\N{REPLACEMENT CHARACTER}")
        pieces.append(whole[len(shown) :] if whole.startswith(shown) else "")
        shown = whole if whole.startswith(shown) else shown
    return pieces
