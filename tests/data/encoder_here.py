"""Encodes in the test's own process: a worker process takes a third of a second to start."""

import pickle

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
