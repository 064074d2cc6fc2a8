"""Runs that end before they are done."""

from pathlib import Path

import pytest

from megatron_infoentropy.data import journal
from megatron_infoentropy.data.preprocess import preprocess


def interrupted(inputs: list[Path], tokenizer: Path, output: Path, at: int, **options: int) -> None:
    """A run that ends with an error when it takes in block number `at`."""
    taken = 0
    add = journal.JournalledRun.add

    def stop(self: journal.JournalledRun, *block: object) -> None:
        nonlocal taken
        taken += 1
        if taken == at:
            raise KeyboardInterrupt
        add(self, *block)  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(journal.JournalledRun, "add", stop)
        with pytest.raises(KeyboardInterrupt):
            preprocess(inputs, tokenizer, output, **options)  # type: ignore[arg-type]
