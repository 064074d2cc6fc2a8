"""The contract in plain PyTorch: any device, any floating dtype, easy to read, not fast.

Works through the tokens in chunks, so that its fp32 temporaries stay small beside the logits.
"""

from collections.abc import Iterator

import torch

from megatron_infoentropy.kernels.contract import (
    DISTANCE,
    MAX,
    OFFSET,
    SCALE,
    SHIFT,
    SLOPE,
    SPREAD,
    TAIL,
    TARGET,
    TARGET_GRADIENT,
    Kernels,
    Options,
    Shard,
    statistics_dtype,
)

CHUNK_BYTES = 1 << 25  # of one temporary


def shard_statistics(
    logits_NV: torch.Tensor,
    target_N: torch.Tensor,
    shard: Shard,
    options: Options,
    inverse_temperature_N: torch.Tensor | None = None,
) -> torch.Tensor:
    """See `kernels.contract`."""
    dtype = statistics_dtype(logits_NV)
    statistics_RN = logits_NV.new_empty((options.rows, logits_NV.shape[0]), dtype=dtype)
    asked = [MAX, TAIL, SPREAD, TARGET] + [DISTANCE] * options.distance + [-1] * options.squares
    for rows in _chunks(logits_NV, dtype):
        scale = _scale_of(rows, options, inverse_temperature_N)
        x, _ = _meant(logits_NV[rows, : shard.columns].to(dtype), options, scale)
        every = _statistics(x, target_N[rows], shard)
        for row, kind in enumerate(asked):
            statistics_RN[row, rows] = every[kind]
    return statistics_RN


def _statistics(x: torch.Tensor, target_N: torch.Tensor, shard: Shard) -> torch.Tensor:
    """All six rows [6, n] of x [n, columns]."""
    ignored = target_N == shard.ignore_index
    if shard.columns == 0:  # the whole shard is padding
        nothing = x.new_zeros((6, len(target_N)))  # filled on the device: a copy would wait for it
        nothing[MAX].fill_(-torch.inf)
        nothing[TAIL].fill_(-1)
        nothing[-1].fill_(-1)
        return nothing.masked_fill(ignored, 0)
    m, top = x.max(-1)
    empty = m == -torch.inf
    d = x - torch.where(empty, 0, m).unsqueeze(-1)
    e = d.exp()
    u = torch.where(e == 0, 0, -d * e).sum(-1)  # 0 * inf: a masked logit carries no entropy
    # Leaving one maximal logit out of the sum is what keeps R exact; a row without mass has R = -1.
    beside = e.scatter(-1, top.unsqueeze(-1), 0)
    r, squares = (
        torch.where(empty, -1, total).masked_fill(m == torch.inf, torch.nan)
        for total in (beside.sum(-1), beside.square().sum(-1))
    )
    distance = torch.where(empty, 0, -d.sum(-1))
    column, owned = _owned_column(target_N, shard)
    x_y = torch.where(owned, x.gather(-1, column).squeeze(-1), 0)
    return torch.stack([m, r, u, x_y, distance, squares]).masked_fill(ignored, 0)


def shard_gradient(
    logits_NV: torch.Tensor,
    target_N: torch.Tensor,
    shard: Shard,
    options: Options,
    coefficients_RN: torch.Tensor,
    out_NV: torch.Tensor,
    inverse_temperature_N: torch.Tensor | None = None,
) -> None:
    """See `kernels.contract`."""
    dtype = statistics_dtype(logits_NV)
    for rows in _chunks(logits_NV, dtype):
        scale = _scale_of(rows, options, inverse_temperature_N)
        x, slope = _meant(logits_NV[rows, : shard.columns].to(dtype), options, scale)
        dz = _gradient(x, slope, target_N[rows], shard, options, coefficients_RN[:, rows])
        out_NV[rows, : shard.columns] = dz.to(out_NV.dtype)
    out_NV[:, shard.columns :] = 0


def _gradient(
    x: torch.Tensor,
    slope: torch.Tensor | None,
    target_N: torch.Tensor,
    shard: Shard,
    options: Options,
    coefficients_RN: torch.Tensor,
) -> torch.Tensor:
    if shard.columns == 0:
        return x
    m, a, b = (coefficients_RN[row].unsqueeze(-1) for row in (SHIFT, SCALE, SLOPE))
    d = x - m
    e = d.exp()
    dz = e * a + torch.where(e == 0, 0, e * d * b)
    if options.squares:
        dz = dz + e.square() * coefficients_RN[-1].unsqueeze(-1)
    if options.distance:
        dz = dz + coefficients_RN[OFFSET].unsqueeze(-1)
    column, owned = _owned_column(target_N, shard)
    own = torch.where(owned, coefficients_RN[TARGET_GRADIENT], dz.gather(-1, column).squeeze(-1))
    dz.scatter_(-1, column, own.unsqueeze(-1))
    if slope is not None:
        dz = dz * slope
    return dz.masked_fill((target_N == shard.ignore_index).unsqueeze(-1), 0)


def _scale_of(
    rows: slice, options: Options, inverse_temperature_N: torch.Tensor | None
) -> torch.Tensor | float:
    """What the (capped) logits of these rows are multiplied by, one number or [n, 1]."""
    if inverse_temperature_N is None:
        return 1 / options.temperature
    return inverse_temperature_N[rows].unsqueeze(-1)


def _meant(
    z: torch.Tensor, options: Options, scale: torch.Tensor | float
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(the logits after softcap and temperature, the softcap's slope at each or None)."""
    x, slope = z, None
    if options.softcap:
        y = z / options.softcap
        x = (y.tanh() * options.softcap).masked_fill(z == -torch.inf, -torch.inf)
        q = (-2 * y.abs()).exp()
        slope = 4 * q / (1 + q) ** 2  # 1 - tanh^2 without a difference
    return x if isinstance(scale, float) and scale == 1 else x * scale, slope


def _owned_column(target_N: torch.Tensor, shard: Shard) -> tuple[torch.Tensor, torch.Tensor]:
    """([N, 1] a column that is safe to index, [N] whether it is the target's)."""
    column = target_N - shard.start
    owned = (column >= 0) & (column < shard.columns) & (target_N != shard.ignore_index)
    return column.clamp(0, shard.columns - 1).unsqueeze(-1), owned


def _chunks(logits_NV: torch.Tensor, dtype: torch.dtype) -> Iterator[slice]:
    n, v = logits_NV.shape
    step = max(1, CHUNK_BYTES // max(1, v * dtype.itemsize))
    for start in range(0, n, step):
        yield slice(start, min(n, start + step))


KERNELS = Kernels("reference", shard_statistics, shard_gradient)
