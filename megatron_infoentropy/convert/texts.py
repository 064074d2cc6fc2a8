"""Token ids of real text, for comparing two models on it."""

import json
from pathlib import Path

from tokenizers import Tokenizer

SEQUENCES = 3


def sequences_from_text(text: Path, model: Path) -> list[list[int]]:
    """At most three sequences of the model's full length, from the start, middle and end of a file.

    text: any UTF-8 file; model: Hugging Face folder with tokenizer.json and config.json.

    Raises:
        ValueError: the file holds less than two tokens.
    """
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    length = json.loads((model / "config.json").read_text())["max_position_embeddings"]
    # A token is rarely longer than 16 bytes: enough text, without encoding all of a large file.
    raw = text.read_bytes()
    starts = {0, max(0, len(raw) // 2), max(0, len(raw) - 16 * length)}
    sequences = [
        tokenizer.encode(raw[start : start + 16 * length].decode("utf-8", "ignore")).ids[:length]
        for start in sorted(starts)[:SEQUENCES]
    ]
    long_enough = [sequence for sequence in sequences if len(sequence) > 1]
    if not long_enough:
        raise ValueError(f"expected text to verify on in {text}, got less than two tokens")
    return long_enough
