"""What is measured: each provider turns a shard of logits and targets into a scalar to minimise.

A provider is made for a setting and may refuse it; what refused is listed with its reason, so that
nothing is silently absent. Ours are here, everybody else's in `peers`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist

from megatron_infoentropy import InfoEntropyConfig, infoentropy_loss
from megatron_infoentropy.bench.cases import Case
from megatron_infoentropy.kernels import dispatch

Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
Computes = Literal["infoentropy", "cross entropy", "label smoothing", "softcap"]

LABEL_SMOOTHING = 0.1
SOFTCAP = 30.0
REASON_CHARACTERS = 160


class Unavailable(Exception):
    """A provider cannot take part; says why, in a few words."""


def failure(error: Exception) -> str:
    """The reason of something that was tried and failed, in one line."""
    text = " ".join(str(error).split())
    return f"it failed: {type(error).__name__}: {text}"[:REASON_CHARACTERS]


@dataclass(frozen=True)
class Setting:
    """What a provider is made for."""

    case: Case
    device: torch.device
    group: dist.ProcessGroup  # of case.tensor_parallel ranks, also where that is one

    @property
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = getattr(torch, self.case.dtype)
        return dtype

    def refuse_shards(self) -> None:
        """For providers that need whole rows."""
        if self.case.tensor_parallel > 1:
            raise Unavailable("it has no tensor parallelism")


@dataclass(frozen=True)
class Provider:
    """One way to compute a loss; `make` raises Unavailable where it cannot run."""

    name: str
    make: Callable[[Setting], Loss]
    computes: Computes = "cross entropy"
    is_ours: bool = False
    gradient_in_forward: bool = False


def ours(setting: Setting) -> list[Provider]:
    """Every backend, writing the gradient into new memory and over the logits, best first; then,
    with the best of them in place, what the entropy, each option and the other collective cost."""
    found = []
    for backend, reason in backends(setting).items():
        found += [_of_backend(backend, reason, inplace) for inplace in (False, True)]
    name = in_place(best_backend(setting))
    found += [
        _ours(f"{name} (cross entropy)", "cross entropy", objective="cross_entropy"),
        _ours(f"{name} (label smoothing)", "label smoothing", label_smoothing=LABEL_SMOOTHING),
        _ours(f"{name} (softcap)", "softcap", softcap=SOFTCAP),
    ]
    if setting.case.tensor_parallel > 1:
        found.append(_ours(f"{name} (all_reduce)", "infoentropy", collective="all_reduce"))
    return found


def backends(setting: Setting) -> dict[str, str | None]:
    """Every backend by name, best first: None where it can be measured, else why not."""
    reasons = dispatch.unavailable(setting.device, setting.dtype)
    if setting.device.type == "cpu" and reasons.get("triton", "") is None:
        reasons["triton"] = "its kernels would be interpreted here (TRITON_INTERPRET)"
    return reasons


def best_backend(setting: Setting) -> str:
    """The backend that "auto" chooses."""
    return next(name for name, reason in backends(setting).items() if reason is None)


def in_place(backend: str) -> str:
    """The name of the provider that writes the gradient over the logits, as our trainer does."""
    return f"{backend} in place"


def _of_backend(backend: str, reason: str | None, inplace: bool) -> Provider:
    name = in_place(backend) if inplace else backend
    if reason is None:
        return _ours(name, "infoentropy", backend=backend, inplace=inplace)

    def refuse(setting: Setting) -> Loss:
        raise Unavailable(reason)

    return Provider(name, refuse, "infoentropy", is_ours=True)


class _Computed(torch.autograd.Function):
    """The same memory as if a model had computed it of two things, its hidden states and its table:
    in place refuses a leaf, its views and what comes of it alone."""

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        source = logits.detach()
        return logits.new_empty(0).set_(  # not a view, as far as autograd knows
            source.untyped_storage(), source.storage_offset(), source.size(), source.stride()
        )

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradient, None


def _ours(
    name: str, computes: Computes, *, inplace: bool = True, **settings: str | float
) -> Provider:
    def make(setting: Setting) -> Loss:
        config = InfoEntropyConfig(**settings)  # type: ignore[arg-type]

        table = torch.empty(0, requires_grad=True)

        def loss(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
            return infoentropy_loss(
                _Computed.apply(logits, table),
                target,
                config,
                group=setting.group,
                inplace_backward=inplace,
            )

        return loss

    return Provider(name, make, computes, is_ours=True)
