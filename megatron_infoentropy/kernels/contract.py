"""What a backend is: two functions over one vocabulary shard. Start reading here.

Shapes: N tokens, V = columns of this rank's logits. A backend knows no process group, no gamma and
no mask; `loss` knows no pointers. Source of the formulas: the log-sum-exp identity, with every sum
taken over non-negative terms so that nothing cancels.

`shard_statistics(logits_NV, target_N, shard, options, inverse_temperature_N) -> statistics_RN`, one
read of the logits:

    row MAX       m   = max x_i
    row TAIL      R   = sum e^(x_i - m) - 1                 the mass beside one maximal logit
    row SPREAD    U   = sum e^(x_i - m) (m - x_i)
    row TARGET    x_y = the target's logit, 0 where another shard owns the target
    row DISTANCE  D   = sum (m - x_i)                       only where options.distance
    last row SQUARES  Q = sum e^(2 (x_i - m)) - 1           only where options.squares

from which, once the shards are folded, CE = (m - x_y) + log1p(R), H = log1p(R) + U / (1 + R),
D / V + log1p(R) is the cross entropy of the uniform distribution (label smoothing), and
(1 + Q) / (1 + R)^2 = sum p_i^2. R is kept instead of Z = 1 + R because for a confident token R is
far below the rounding of 1.

`shard_gradient(logits_NV, target_N, shard, options, coefficients_RN, out_NV, inverse_temperature_N)
-> None`, one read, one write:

    row SHIFT   m    the maximum over all shards
    row SCALE   a    dz_i = (e_i (a + b (x_i - m) + q e_i) + c) s_i,  e_i = e^(x_i - m)
    row SLOPE   b
    row TARGET_GRADIENT  g_y  the gradient of the target's own column is g_y s_y
    row OFFSET  c    only where options.distance, else 0
    last row QUADRATIC  q  only where options.squares, else 0

x_i is the logit as the model means it: with options, softcap tanh(z_i / softcap) / temperature (or,
where `inverse_temperature_N` is given, times that of the token) of the stored z_i, computed in fp32
and never stored; s_i = 1 - tanh^2(z_i / softcap), 1 without a softcap (the factor 1 / temperature
is the caller's, folded into the coefficients). s_i is taken from z_i without a difference: x_i
rounds to the cap where s_i is still 1e-8.

Conventions that every backend keeps:
  * statistics and coefficients are fp32 (fp64 for fp64 logits); `out_NV` has the logits' dtype, is
    rounded once, and may be the logits themselves; a bf16 gradient may be of a value within 3e-6:
    99.9 % are the rounded fp32 gradient, none is more than an ulp from it;
  * columns at or beyond `shard.columns` are padding: never read, gradient exactly 0;
  * ignored tokens: never read; statistics 0, gradient exactly 0, even where the row holds NaN;
  * a logit of -inf has probability exactly 0 and carries no entropy, also under a softcap, so that
    a mask stays a mask (s = 0, for the target too); a row (or a shard) of only -inf has m = -inf,
    R = Q = -1 (no mass), U = D = 0; one -inf beside a finite logit makes D = inf; NaN or +inf in a
    row gives NaN in that row only (under a softcap +inf is the cap);
  * of the logits and `out_NV` the last dimension is contiguous, rows may lie any distance apart
    without overlapping; `target_N` is int64 and, like the coefficients, contiguous;
    `inverse_temperature_N` is None or like the statistics, positive and contiguous.
"""

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch

MAX, TAIL, SPREAD, TARGET, DISTANCE = range(5)  # rows of the statistics
SHIFT, SCALE, SLOPE, TARGET_GRADIENT, OFFSET = range(5)  # rows of the coefficients


class Shard(NamedTuple):
    """Where this rank's columns lie in the vocabulary."""

    start: int  # vocabulary id of column 0
    columns: int  # columns that take part; those beyond are padding
    ignore_index: int  # a target of this value marks a token that takes no part


class Options(NamedTuple):
    """What is done to a logit before anything else, and what else is summed. The defaults cost
    nothing: a backend compiles them away."""

    softcap: float = 0.0  # bound on |logit|; 0 is none
    temperature: float = 1.0  # > 0; divides the (capped) logits
    distance: bool = False  # also the rows DISTANCE and OFFSET
    squares: bool = False  # also, as the last row, SQUARES and QUADRATIC

    @property
    def rows(self) -> int:
        """Rows of the statistics and of the coefficients."""
        return 4 + self.distance + self.squares


PLAIN = Options()


class ShardStatistics(Protocol):
    def __call__(
        self,
        logits_NV: torch.Tensor,
        target_N: torch.Tensor,
        shard: Shard,
        options: Options,
        inverse_temperature_N: torch.Tensor | None = None,
    ) -> torch.Tensor: ...


class ShardGradient(Protocol):
    def __call__(
        self,
        logits_NV: torch.Tensor,
        target_N: torch.Tensor,
        shard: Shard,
        options: Options,
        coefficients_RN: torch.Tensor,
        out_NV: torch.Tensor,
        inverse_temperature_N: torch.Tensor | None = None,
    ) -> None: ...


@dataclass(eq=False)  # not frozen: torch 2.11's compiler looks into those and fails at functions
class Kernels:
    """One backend: its name and its two functions."""

    name: str
    shard_statistics: ShardStatistics
    shard_gradient: ShardGradient


def statistics_dtype(logits: torch.Tensor) -> torch.dtype:
    """fp64 logits are computed in fp64 (for gradient checks), everything else in fp32."""
    return torch.float64 if logits.dtype == torch.float64 else torch.float32
