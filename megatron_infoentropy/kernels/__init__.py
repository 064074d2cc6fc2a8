"""Chooses a backend. `contract` says what one is; each other module is one.

An explicitly named backend never falls back; an automatic choice is logged once.
"""

import functools
import logging

import torch

from megatron_infoentropy.config import Backend
from megatron_infoentropy.kernels import native, reference
from megatron_infoentropy.kernels.contract import Kernels

logger = logging.getLogger(__name__)


def select(name: Backend, device: torch.device, dtype: torch.dtype) -> Kernels:
    """The kernels for logits of this device and dtype.

    Raises:
        RuntimeError: the named backend cannot take such logits; says why and what can.
        ValueError: no backend has that name.
    """
    if name == "reference":
        return reference.KERNELS
    if name == "native":
        reason = native.why_unavailable(device, dtype)
        if reason is not None:
            raise RuntimeError(
                f"backend 'native' cannot run here: {reason}; "
                "use backend='reference', or 'auto' to choose by itself"
            )
        return native.KERNELS
    if name == "auto":
        return _automatic(device, dtype)
    raise ValueError(f"backend must be 'auto', 'native' or 'reference', got {name!r}")


@functools.cache
def _automatic(device: torch.device, dtype: torch.dtype) -> Kernels:
    reason = native.why_unavailable(device, dtype)
    if reason is None:
        return native.KERNELS
    level = logging.WARNING if device.type == "cpu" and dtype in native.DTYPES else logging.INFO
    logger.log(level, "InfoEntropy kernels: PyTorch reference, not native, since %s", reason)
    return reference.KERNELS
