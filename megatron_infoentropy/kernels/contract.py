"""What a backend is: two functions over one vocabulary shard. Start reading here.

Shapes: N tokens, V = columns of this rank's logits. A backend knows no process group, no gamma and
no mask; `loss` knows no pointers. Source of the formulas: the log-sum-exp identity, with every sum
taken over non-negative terms so that nothing cancels.

`shard_statistics(logits_NV, target_N, shard) -> statistics_4N`, one read of the logits:

    row MAX     m   = max x_i
    row TAIL    R   = sum e^(x_i - m) - 1                 the mass beside one maximal logit
    row SPREAD  U   = sum e^(x_i - m) (m - x_i)
    row TARGET  x_y = the target's logit, 0 where another shard owns the target

from which, once the shards are folded, CE = (m - x_y) + log1p(R) and H = log1p(R) + U / (1 + R).
R is kept instead of Z = 1 + R because for a confident token R is far below the rounding of 1.

`shard_gradient(logits_NV, target_N, shard, coefficients_4N, out_NV) -> None`, one read, one write:

    row SHIFT   m    the maximum over all shards
    row SCALE   a    dz_i = e^(x_i - m) (a + b (x_i - m))
    row SLOPE   b
    row TARGET  g_y  the gradient of the target's own column, written as it is

Conventions that every backend keeps:
  * statistics and coefficients are fp32 (fp64 for fp64 logits); `out_NV` has the logits' dtype, is
    rounded once, and may be the logits themselves;
  * columns at or beyond `shard.columns` are padding: never read, gradient exactly 0;
  * ignored tokens: never read; statistics 0, gradient exactly 0, even where the row holds NaN;
  * a logit of -inf has probability exactly 0 and carries no entropy; a row (or a shard) of only
    -inf has m = -inf, R = -1 (no mass), U = 0; NaN or +inf in a row gives NaN in that row only;
  * of the logits and `out_NV` the last dimension is contiguous, rows may lie any distance apart
    without overlapping; `target_N` is int64 and, like the coefficients, contiguous.
"""

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch

MAX, TAIL, SPREAD, TARGET = range(4)  # rows of the statistics
SHIFT, SCALE, SLOPE, TARGET_GRADIENT = range(4)  # rows of the coefficients


class Shard(NamedTuple):
    """Where this rank's columns lie in the vocabulary."""

    start: int  # vocabulary id of column 0
    columns: int  # columns that take part; those beyond are padding
    ignore_index: int  # a target of this value marks a token that takes no part


class ShardStatistics(Protocol):
    def __call__(
        self, logits_NV: torch.Tensor, target_N: torch.Tensor, shard: Shard
    ) -> torch.Tensor: ...


class ShardGradient(Protocol):
    def __call__(
        self,
        logits_NV: torch.Tensor,
        target_N: torch.Tensor,
        shard: Shard,
        coefficients_4N: torch.Tensor,
        out_NV: torch.Tensor,
    ) -> None: ...


@dataclass(frozen=True)
class Kernels:
    """One backend: its name and its two functions."""

    name: str
    shard_statistics: ShardStatistics
    shard_gradient: ShardGradient


def statistics_dtype(logits: torch.Tensor) -> torch.dtype:
    """fp64 logits are computed in fp64 (for gradient checks), everything else in fp32."""
    return torch.float64 if logits.dtype == torch.float64 else torch.float32
