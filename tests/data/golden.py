"""What Megatron's tools/preprocess_data.py would write, with its own builder and transformers."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder
from transformers import AutoTokenizer


def write_golden(
    prefix: Path,
    texts: Iterable[str],
    tokenizer_folder: Path,
    *,
    append_eod: bool = True,
    special_tokens: bool = True,
) -> None:
    """One dataset; an empty document is a boundary without a sequence."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    dtype = DType.optimal_dtype(len(tokenizer))
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    for text in texts:
        ids = tokenizer(text, add_special_tokens=special_tokens).input_ids
        if ids and append_eod:
            ids.append(tokenizer.eos_token_id)
        builder.add_document(np.array(ids, dtype=np.int64), [len(ids)] if ids else [])
    builder.finalize(f"{prefix}.idx")


def assert_same_files(found: Path, expected: Path) -> None:
    """Every file of a folder is in the other too, with the same bytes."""
    names = [path.name for path in expected.iterdir()]
    assert names
    for name in names:
        assert (found / name).read_bytes() == (expected / name).read_bytes(), name
