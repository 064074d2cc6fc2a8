"""megatron_infoentropy: the InfoEntropy (MiLe) loss for Megatron-style model-parallel training.

The public names are resolved on first use, so that `import megatron_infoentropy` (and with it
commands that need no tensors, such as `infoentropy preprocess`) does not import torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron_infoentropy.config import InfoEntropyConfig
    from megatron_infoentropy.loss import (
        TokenStatistics,
        infoentropy_loss,
        linear_infoentropy_loss,
        linear_vocab_parallel_statistics,
        vocab_parallel_statistics,
    )

__version__ = "0.1.0"

__all__ = [
    "InfoEntropyConfig",
    "TokenStatistics",
    "infoentropy_loss",
    "linear_infoentropy_loss",
    "linear_vocab_parallel_statistics",
    "vocab_parallel_statistics",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    room = "config" if name == "InfoEntropyConfig" else "loss"
    return getattr(import_module(f"{__name__}.{room}"), name)
