"""The contract's two functions as PyTorch operators, so that torch.compile can see around them.

A compiled graph holds `infoentropy::shard_statistics` and `infoentropy::shard_gradient` as opaque
nodes with known shapes; everything on [tokens] between them is fused by the compiler. Outside a
compiled region the functions are called directly, which saves the dispatcher's time.
"""

import torch

from megatron_infoentropy.kernels.contract import Kernels, Options, Shard, statistics_dtype
from megatron_infoentropy.kernels.dispatch import by_name


@torch.library.custom_op("infoentropy::shard_statistics", mutates_args=())
def statistics_operator(
    logits: torch.Tensor,
    target: torch.Tensor,
    start: int,
    columns: int,
    ignore_index: int,
    softcap: float,
    temperature: float,
    distance: bool,
    backend: str,
) -> torch.Tensor:
    shard, options = Shard(start, columns, ignore_index), Options(softcap, temperature, distance)
    return by_name(backend).shard_statistics(logits, target, shard, options)


@statistics_operator.register_fake
def _(
    logits: torch.Tensor,
    target: torch.Tensor,
    start: int,
    columns: int,
    ignore_index: int,
    softcap: float,
    temperature: float,
    distance: bool,
    backend: str,
) -> torch.Tensor:
    rows = Options(softcap, temperature, distance).rows
    return logits.new_empty((rows, logits.shape[0]), dtype=statistics_dtype(logits))


@torch.library.custom_op("infoentropy::shard_gradient", mutates_args=())
def gradient_operator(
    logits: torch.Tensor,
    target: torch.Tensor,
    coefficients: torch.Tensor,
    start: int,
    columns: int,
    ignore_index: int,
    softcap: float,
    temperature: float,
    distance: bool,
    backend: str,
) -> torch.Tensor:
    shard, options = Shard(start, columns, ignore_index), Options(softcap, temperature, distance)
    out = logits.new_empty(logits.shape)
    by_name(backend).shard_gradient(logits, target, shard, options, coefficients, out)
    return out


@gradient_operator.register_fake
def _(
    logits: torch.Tensor,
    target: torch.Tensor,
    coefficients: torch.Tensor,
    start: int,
    columns: int,
    ignore_index: int,
    softcap: float,
    temperature: float,
    distance: bool,
    backend: str,
) -> torch.Tensor:
    return logits.new_empty(logits.shape)


def shard_statistics(
    kernels: Kernels,
    logits_NV: torch.Tensor,
    target_N: torch.Tensor,
    shard: Shard,
    options: Options,
) -> torch.Tensor:
    """See `kernels.contract`."""
    if torch.compiler.is_compiling():
        result: torch.Tensor = statistics_operator(
            logits_NV, target_N, *shard, *options, backend=kernels.name
        )
        return result
    return kernels.shard_statistics(logits_NV, target_N, shard, options)


def shard_gradient(
    kernels: Kernels,
    logits_NV: torch.Tensor,
    target_N: torch.Tensor,
    shard: Shard,
    options: Options,
    coefficients_RN: torch.Tensor,
    *,
    inplace: bool,
) -> torch.Tensor:
    """The gradient [N, V], over the logits where `inplace`; see `kernels.contract`.

    A compiled graph gets a new tensor whatever `inplace` says: it plans its own memory.
    """
    if torch.compiler.is_compiling():
        result: torch.Tensor = gradient_operator(
            logits_NV, target_N, coefficients_RN, *shard, *options, backend=kernels.name
        )
        return result
    out_NV = logits_NV.detach() if inplace else torch.empty_like(logits_NV)
    kernels.shard_gradient(logits_NV, target_N, shard, options, coefficients_RN, out_NV)
    return out_NV
