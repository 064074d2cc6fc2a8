"""From vocabulary-sharded logits to per-token statistics, and from those to one objective.

`statistics` is the one function with a gradient of its own and the one collective over the
vocabulary; `weighting` and `objective` are ordinary PyTorch on `[tokens]`.
"""

from megatron_infoentropy.loss.linear import (
    linear_infoentropy_loss,
    linear_vocab_parallel_statistics,
)
from megatron_infoentropy.loss.objective import infoentropy_loss
from megatron_infoentropy.loss.statistics import TokenStatistics, vocab_parallel_statistics

__all__ = [
    "TokenStatistics",
    "infoentropy_loss",
    "linear_infoentropy_loss",
    "linear_vocab_parallel_statistics",
    "vocab_parallel_statistics",
]
