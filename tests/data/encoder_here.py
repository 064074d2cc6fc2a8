"""Runs in the test's own process: a worker process takes a third of a second to start."""

import pickle
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from megatron_infoentropy.data import journal
from megatron_infoentropy.data.blocks import Block
from megatron_infoentropy.data.workers import Encoded, Encoder


class EncoderHere:
    """In place of a worker process."""

    def __init__(self, settings: bytes) -> None:
        self.encoder = Encoder(pickle.loads(settings))

    def encode(self, block: Block) -> Encoded:
        return self.encoder(block.data, block.is_table)

    def close(self) -> None:
        pass


def interrupted(
    prepare: Callable[..., object], inputs: list[Path], at: int, **options: Any
) -> None:
    """A run of the fixture `prepare` that is interrupted when it takes in block number `at`."""
    taken, add = count(1), journal.JournalledRun.add

    def stop(self: journal.JournalledRun, block: Block, encoded: Encoded) -> None:
        if next(taken) == at:
            raise KeyboardInterrupt
        add(self, block, encoded)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(journal.JournalledRun, "add", stop)
        with pytest.raises(KeyboardInterrupt):
            prepare(inputs, **options)


def when_reading(patch: pytest.MonkeyPatch, name: str, change: Callable[[], object]) -> None:
    """Have something happen when the first lines of the input `name` are taken in."""
    add = journal.JournalledRun.add

    def and_change(self: journal.JournalledRun, block: Block, encoded: Encoded) -> None:
        if block.path.name == name and block.start.line == 1:
            change()
        add(self, block, encoded)

    patch.setattr(journal.JournalledRun, "add", and_change)
