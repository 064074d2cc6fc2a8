"""Runs in the test's own process: a worker process takes a third of a second to start."""

import pickle
from pathlib import Path

import pytest

from megatron_infoentropy.data import journal
from megatron_infoentropy.data.blocks import Block
from megatron_infoentropy.data.preprocess import preprocess
from megatron_infoentropy.data.workers import Encoded, Encoder


class EncoderHere:
    """In place of a worker process."""

    def __init__(self, settings: bytes) -> None:
        self.encoder = Encoder(pickle.loads(settings))

    def encode(self, block: Block) -> Encoded:
        return self.encoder(block.data, block.is_table)

    def close(self) -> None:
        pass


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
