"""Token ids to compare two models on: texts of the model's full length."""

import random
from pathlib import Path

from tokenizers import Tokenizer

from megatron_infoentropy.convert.hf_config import read_config
from megatron_infoentropy.data.indexed import IndexedReader

SEQUENCES = 3
LONGEST = 4096
"""Beyond this a text costs more than it tells; positions are compared by the configuration."""


def sequences_for(
    folder: Path, text: Path | None = None, data: Path | None = None
) -> list[list[int]]:
    """Return three sequences of full length, from the start, middle and end of a text.

    Args:
        folder: a Hugging Face folder; without a tokenizer in it the ids are drawn at random.
        text: any UTF-8 file; by default the reference texts that come with Python.
        data: instead of a text the prefix of an indexed dataset (its path without .bin), whose
            documents are read one after another, as Megatron does.

    Raises:
        ValueError: less than two tokens in the text or the dataset, or both are given.
    """
    require_readable(text, data)
    length = length_for(folder)
    if data is not None:
        return _pieces(_open(data), length)
    if not (folder / "tokenizer.json").is_file():
        draw = random.Random(0)
        vocab_size = read_config(folder).vocab_size
        return [[draw.randrange(vocab_size) for _ in range(length)] for _ in range(SEQUENCES)]
    raw = _python_reference() if text is None else text.read_bytes()
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    # A token is rarely longer than 16 bytes: enough text, without encoding all of a large file.
    starts = {0, max(0, len(raw) // 2), max(0, len(raw) - 16 * length)}
    sequences = [
        tokenizer.encode(raw[start : start + 16 * length].decode("utf-8", "ignore")).ids[:length]
        for start in sorted(starts)
    ]
    long_enough = [sequence for sequence in sequences if len(sequence) > 1]
    if not long_enough:
        raise ValueError(f"expected text to verify on in {text}, got less than two tokens")
    return long_enough


def require_readable(text: Path | None, data: Path | None) -> None:
    """Look whether there is something to verify on, before a conversion that may take hours.

    Raises:
        ValueError: no such text or dataset, less than two tokens in it, or both are given.
    """
    if text is not None and data is not None:
        raise ValueError("expected a text or a dataset to verify on, got both")
    if text is not None and not text.is_file():
        raise ValueError(f"expected a text to verify on, found no file {text}")
    if text is not None and not text.stat().st_size:
        raise ValueError(f"expected a text to verify on, {text} is empty")
    if data is not None and len(_open(data).tokens) < 2:
        raise ValueError(f"expected a dataset to verify on in {data}, got less than two tokens")


def _open(data: Path) -> IndexedReader:
    return IndexedReader(data.with_suffix("") if data.suffix in (".bin", ".idx") else data)


def _pieces(reader: IndexedReader, length: int) -> list[list[int]]:
    last = max(0, len(reader.tokens) - length)
    starts = sorted({0, last // 2, last})
    return [reader.tokens[start : start + length].tolist() for start in starts]


def length_for(folder: Path) -> int:
    """Return the model's full length as transformers understands config.json, or LONGEST."""
    return min(LONGEST, int(read_config(folder).max_position_embeddings))


def _python_reference() -> bytes:
    from pydoc_data.topics import topics

    return "\n\n".join(topics.values()).encode()
