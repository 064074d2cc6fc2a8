"""The contract's two functions as PyTorch operators, so that torch.compile can see around them.

A compiled graph holds `infoentropy::shard_statistics` and `infoentropy::shard_gradient` as opaque
nodes with known shapes; everything on [tokens] between them is fused by the compiler. Outside a
compiled region the functions are called directly, which saves the dispatcher's time.
"""

from typing import Any, NamedTuple

import torch

from megatron_infoentropy.kernels.contract import Kernels, Options, Shard, statistics_dtype
from megatron_infoentropy.kernels.dispatch import by_name

# Every operator's last arguments: those of `Shard`, those of `Options`, each token's temperature if
# they differ, the backend's name.
_SETTINGS = (
    "int start, int columns, int ignore_index, float softcap, float temperature, bool distance, "
    "bool squares, Tensor? inverse_temperature, str backend"
)


def _settings(*values: Any) -> tuple[Shard, Options, torch.Tensor | None, Kernels]:
    return Shard(*values[:3]), Options(*values[3:7]), values[7], by_name(values[8])


@torch.library.custom_op(
    "infoentropy::shard_statistics",
    mutates_args=(),
    schema=f"(Tensor logits, Tensor target, {_SETTINGS}) -> Tensor",
)
def statistics_operator(logits: torch.Tensor, target: torch.Tensor, *values: Any) -> torch.Tensor:
    shard, options, inverse_temperature, kernels = _settings(*values)
    return kernels.shard_statistics(logits, target, shard, options, inverse_temperature)


@statistics_operator.register_fake
def _(logits: torch.Tensor, target: torch.Tensor, *values: Any) -> torch.Tensor:
    rows = _settings(*values)[1].rows
    return logits.new_empty((rows, logits.shape[0]), dtype=statistics_dtype(logits))


@torch.library.custom_op(
    "infoentropy::shard_gradient",
    mutates_args=(),
    schema=f"(Tensor logits, Tensor target, Tensor coefficients, {_SETTINGS}) -> Tensor",
)
def gradient_operator(
    logits: torch.Tensor, target: torch.Tensor, coefficients: torch.Tensor, *values: Any
) -> torch.Tensor:
    shard, options, inverse_temperature, kernels = _settings(*values)
    out = logits.new_empty(logits.shape)
    kernels.shard_gradient(logits, target, shard, options, coefficients, out, inverse_temperature)
    return out


@gradient_operator.register_fake
def _(logits: torch.Tensor, *others: Any) -> torch.Tensor:
    return logits.new_empty(logits.shape)


def require_plain(**tensors: torch.Tensor) -> None:
    """Raise ValueError for a tensor whose elements do not lie where its address says.

    Kernels are handed addresses: at a wrong one the process would end, or take other numbers. A
    graph that is being compiled has operators in their place and no addresses.
    """
    if torch.compiler.is_compiling():
        return
    for name, x in tensors.items():
        if not (_is_strided(x) and _has_memory(x)):
            raise ValueError(f"expected a plain tensor as {name}, got {_what_instead(x)}")


def is_subclass_with_own_dispatch(x: torch.Tensor) -> bool:
    """Return whether a tensor's class redefines what operations do, as DTensor does."""
    return type(x).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__


def _is_strided(x: torch.Tensor) -> bool:
    if is_subclass_with_own_dispatch(x) or x.layout is not torch.strided:
        return False
    return not (x.is_nested or x.is_neg())


def _has_memory(x: torch.Tensor) -> bool:
    if not (x.is_cpu or x.is_cuda):  # no compiled kernel runs there
        return True
    try:
        return x.data_ptr() != 0 or x.numel() == 0
    except RuntimeError:  # a tensor of torch.func: nothing lies anywhere
        return False


def _what_instead(x: torch.Tensor) -> str:
    kind = type(x).__name__
    if hasattr(x, "placements"):
        return (
            f"a {kind} placed {list(x.placements)}: pass its .to_local(), and the group that the "
            "vocabulary is split over as `group`; logits that are sharded evenly along their last "
            "dimension over that very group, and nothing else, are taken as they are"
        )
    if is_subclass_with_own_dispatch(x):
        return (
            f"a {kind}, which kernels cannot read: pass the tensor that it wraps, or compile the "
            "loss with torch.compile, whose operators know shapes without numbers"
        )
    if x.layout is not torch.strided or x.is_nested:
        kind = "nested tensor" if x.is_nested else f"tensor of layout {x.layout}"
        return f"a {kind}: make it dense, with .to_dense() or .to_padded_tensor()"
    if x.is_neg():
        return "a tensor whose sign is still to be turned: call .resolve_neg()"
    return (
        f"one of shape {list(x.shape)} without memory: zeros that were never made and a storage "
        "that was freed need some first; torch.func and functionalization are not supported"
    )


class ShardKernels(NamedTuple):
    """A backend's two functions, bound to a shard and to options; see `kernels.contract`."""

    kernels: Kernels
    shard: Shard
    options: Options

    def statistics(
        self,
        logits_NV: torch.Tensor,
        target_N: torch.Tensor,
        inverse_temperature_N: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The statistics [R, N]."""
        kernels, shard, options = self
        if torch.compiler.is_compiling():
            result: torch.Tensor = statistics_operator(
                logits_NV, target_N, *shard, *options, inverse_temperature_N, kernels.name
            )
            return result
        require_plain(logits=logits_NV, target=target_N)
        return kernels.shard_statistics(logits_NV, target_N, shard, options, inverse_temperature_N)

    def gradient(
        self,
        logits_NV: torch.Tensor,
        target_N: torch.Tensor,
        coefficients_RN: torch.Tensor,
        inverse_temperature_N: torch.Tensor | None = None,
        *,
        inplace: bool,
    ) -> torch.Tensor:
        """The gradient [N, V], over the logits where `inplace`.

        A compiled graph gets a new tensor whatever `inplace` says: it plans its own memory.
        """
        kernels, shard, options = self
        if torch.compiler.is_compiling():
            result: torch.Tensor = gradient_operator(
                *(logits_NV, target_N, coefficients_RN, *shard, *options),
                *(inverse_temperature_N, kernels.name),
            )
            return result
        require_plain(logits=logits_NV, coefficients=coefficients_RN)
        out_NV = logits_NV.detach() if inplace else torch.empty_like(logits_NV)
        kernels.shard_gradient(
            logits_NV, target_N, shard, options, coefficients_RN, out_NV, inverse_temperature_N
        )
        return out_NV
