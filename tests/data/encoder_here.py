"""Runs in the test's own process: a worker process takes a third of a second to start."""

import pickle
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any
from unittest.mock import Mock

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


def when_taken_in(
    patch: pytest.MonkeyPatch, is_it: Callable[[Block], bool], act: Callable[[], object]
) -> None:
    """Have something happen when a run takes in a block that it is."""
    add = journal.JournalledRun.add

    def act_and_add(self: journal.JournalledRun, block: Block, encoded: Encoded) -> None:
        if is_it(block):
            act()
        add(self, block, encoded)

    patch.setattr(journal.JournalledRun, "add", act_and_add)


def when_reading(patch: pytest.MonkeyPatch, name: str, act: Callable[[], object]) -> None:
    """Have something happen when the first lines of the input `name` are taken in."""
    when_taken_in(patch, lambda block: (block.path.name, block.start.line) == (name, 1), act)


def interrupted(
    prepare: Callable[..., object], inputs: list[Path], at: int, **options: Any
) -> None:
    """A run of the fixture `prepare` that is interrupted when it takes in block number `at`."""
    taken = count(1)
    with pytest.MonkeyPatch.context() as patch:
        when_taken_in(patch, lambda _: next(taken) == at, Mock(side_effect=KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            prepare(inputs, **options)
