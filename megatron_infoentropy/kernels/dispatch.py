"""Chooses a backend. An explicitly named one never falls back; an automatic choice is logged once.

The order of preference is the order of the table: compiled kernels for the logits' device first.
"""

import functools
import logging
from collections.abc import Callable

import torch

from megatron_infoentropy.config import Backend
from megatron_infoentropy.kernels import cuda, native, reference, triton_kernels
from megatron_infoentropy.kernels.contract import Kernels

logger = logging.getLogger(__name__)

Reason = Callable[[torch.device, torch.dtype], str | None]  # None where the kernels can run


def _always(device: torch.device, dtype: torch.dtype) -> None:
    return None


# Best first; `reference` takes everything and ends the list.
BACKENDS: dict[str, tuple[Kernels, Reason]] = {
    "native": (native.KERNELS, native.why_unavailable),
    "triton": (triton_kernels.KERNELS, triton_kernels.why_unavailable),
    "cuda": (cuda.KERNELS, cuda.why_unavailable),
    "reference": (reference.KERNELS, _always),
}


def by_name(name: str) -> Kernels:
    """The kernels of that name, whether or not they can run here."""
    return BACKENDS[name][0]


def unavailable(device: torch.device, dtype: torch.dtype) -> dict[str, str | None]:
    """Every backend by name, best first: None where it runs on such logits, else why it cannot."""
    return {name: reason(device, dtype) for name, (_, reason) in BACKENDS.items()}


def select(name: Backend, device: torch.device, dtype: torch.dtype) -> Kernels:
    """The kernels for logits of this device and dtype.

    Raises:
        RuntimeError: the named backend cannot take such logits; says why and what can.
        ValueError: no backend has that name.
    """
    if name == "auto":
        return _automatic(device, dtype)
    if name not in BACKENDS:
        raise ValueError(f"backend must be 'auto' or one of {list(BACKENDS)}, got {name!r}")
    kernels, why_unavailable = BACKENDS[name]
    reason = why_unavailable(device, dtype)
    if reason is not None:
        can = [other for other, why in unavailable(device, dtype).items() if why is None]
        raise RuntimeError(
            f"backend {name!r} cannot run here: {reason}; these can: {', '.join(can)}, or let "
            "'auto' choose"
        )
    return kernels


@functools.cache
def _automatic(device: torch.device, dtype: torch.dtype) -> Kernels:
    reasons = unavailable(device, dtype)
    name = next(name for name, reason in reasons.items() if reason is None)
    if name == "reference":
        # Plain PyTorch where compiled kernels exist for such logits is a loss worth a warning.
        level = logging.WARNING if dtype in native.DTYPES else logging.INFO
        why = "; ".join(
            f"not {other}, since {reason}" for other, reason in reasons.items() if reason
        )
        logger.log(level, "InfoEntropy kernels: reference, plain PyTorch (%s)", why)
    else:
        logger.info("InfoEntropy kernels: %s", name)
    return BACKENDS[name][0]


# A compiled graph burns the choice in instead of tracing through it. This is all that
# torch.compiler.assume_constant_result does; calling it imports the compiler: seconds.
select._dynamo_marked_constant = True  # type: ignore[attr-defined]
