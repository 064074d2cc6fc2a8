"""Cross entropy, entropy and log-sum-exp of every token, from logits whose vocabulary is sharded.

    logits [N, V/T] --shard kernel--> [R, N] --one all-gather, fold by rank--> ce, H, lse, u, S

Each result is exactly differentiable. With upstream gradients g_ce, g_H, g_lse, g_u, g_S of a
token, p the softmax, S = sum p^2, d = x - M and Ubar = U / Z:

    dz_i = p_i (A + B d_i + E p_i) + C - g_ce [i = y]
    A = g_ce + g_lse + g_u - g_H Ubar - 2 g_S S,    B = -g_H,    C = -g_u / V,    E = 2 g_S

so one kernel serves every loss made of them, and a new weighting needs no new kernel. The backward
pass has no collective. Shapes: N tokens, V vocabulary, T ranks, R = 4 rows of statistics (one more
each where u and S are asked for). Statistics are fp32 (fp64 for fp64 logits). Source: chain rule;
checked against float64 in tests/loss.
"""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch

from megatron_infoentropy.config import Backend, Collective
from megatron_infoentropy.kernels.contract import Options, statistics_dtype
from megatron_infoentropy.loss import layout
from megatron_infoentropy.loss.collective import Group, RowStatistics, start_join
from megatron_infoentropy.loss.layout import Settings, StatisticsArguments


class TokenStatistics(NamedTuple):
    """Statistics of every token's predicted distribution; fp32, nats, in the target's shape.

    All but `is_top` are differentiable. Ignored tokens have 0.
    """

    cross_entropy: torch.Tensor  # -ln p(target) >= 0
    entropy: torch.Tensor  # -sum p ln p, in [0, ln vocab_size]
    logsumexp: torch.Tensor  # ln sum e^logit
    is_top: torch.Tensor  # bool: no logit is above the target's; its mean is top-1 accuracy
    uniform_cross_entropy: torch.Tensor | None = None  # -mean ln p over the vocabulary, if asked
    sum_p_squared: torch.Tensor | None = None  # sum p^2, in [1/V, 1], if asked; -ln of it: Renyi-2

    def present(self) -> tuple[torch.Tensor, ...]:
        """Those that were asked for: what an autograd function returns."""
        return tuple(part for part in self if part is not None)

    @classmethod
    def of_present(
        cls, parts: Iterable[torch.Tensor], *, uniform: bool, squares: bool
    ) -> "TokenStatistics":
        """The reverse of `present`."""
        ce, entropy, lse, is_top, *optional = parts
        first, last = optional[0] if uniform else None, optional[-1] if squares else None
        return cls(ce, entropy, lse, is_top, first, last)


class Saved(NamedTuple):
    """The parts of every token that the backward pass needs besides its logits; each [N]."""

    maximum: torch.Tensor
    z: torch.Tensor
    mean_distance: torch.Tensor  # Ubar = U / Z
    cross_entropy: torch.Tensor
    entropy: torch.Tensor
    sum_p_squared: torch.Tensor | None


class Upstream(NamedTuple):
    """Gradients of the objective by each result; None where it does not depend on one. Each [N]."""

    cross_entropy: torch.Tensor | None
    entropy: torch.Tensor | None
    logsumexp: torch.Tensor | None
    uniform_cross_entropy: torch.Tensor | None
    sum_p_squared: torch.Tensor | None


def upstream_of(gradients: Sequence[torch.Tensor | None], options: Options) -> Upstream:
    """What autograd hands back for `TokenStatistics.present`."""
    g_ce, g_entropy, g_lse, _, *optional = gradients
    g_uniform = optional[0] if options.distance else None
    g_squares = optional[-1] if options.squares else None
    return Upstream(g_ce, g_entropy, g_lse, g_uniform, g_squares)


def token_results(
    row: RowStatistics,
    target_N: torch.Tensor,
    vocabulary: int,
    ignore_index: int,
    options: Options,
) -> tuple[TokenStatistics, Saved]:
    """The results, and what to keep for `coefficients`."""
    ignored = target_N == ignore_index
    z = (1 + row.tail).masked_fill(ignored, 1)
    log_z, mean_distance = row.tail.log1p(), row.spread / z
    ce = (row.maximum - row.target_logit) + log_z
    # A target that no shard owns must not look like a very good prediction.
    ce = ce.masked_fill((target_N < 0) | (target_N >= vocabulary), torch.nan)
    ce = ce.masked_fill(ignored, 0)
    entropy = (log_z + mean_distance).masked_fill(ignored, 0)
    lse = (row.maximum + log_z).masked_fill(ignored, 0)
    is_top = (row.target_logit == row.maximum) & ~ignored
    uniform = None
    if row.distance is not None:
        uniform = (row.distance / vocabulary + log_z).masked_fill(ignored, 0)
    squares = None
    if row.squares is not None:
        squares = ((1 + row.squares) / z.square()).masked_fill(ignored, 0)
    return (
        TokenStatistics(ce, entropy, lse, is_top, uniform, squares),
        Saved(row.maximum, z, mean_distance, ce, entropy, squares),
    )


def coefficients(
    upstream: Upstream,
    saved: Saved,
    vocabulary: int,
    options: Options,
    inverse_temperature_N: torch.Tensor | None = None,
) -> torch.Tensor:
    """[R, N] for the gradient kernel, in the order of the contract.

    The target's own column is formed here as g_ce (p_y - 1) = g_ce expm1(-ce), which stays exact
    for confident tokens, where p_y rounds to 1.
    """
    g_ce, g_entropy, g_lse, g_uniform, g_squares = upstream
    scale = slope = own = offset = quadratic = torch.zeros_like(saved.z)
    p_y = torch.exp(-saved.cross_entropy)
    if g_ce is not None:
        scale = scale + g_ce
        own = own + g_ce * torch.expm1(-saved.cross_entropy)
    if g_lse is not None:
        scale = scale + g_lse
        own = own + g_lse * p_y
    if g_entropy is not None:
        scale = scale - g_entropy * saved.mean_distance
        slope = slope - g_entropy
        # p_y (ln p_y + H): 0 for a target of probability 0, where ce is infinite.
        surprise = torch.where(p_y == 0, 0, p_y * (saved.entropy - saved.cross_entropy))
        own = own - g_entropy * surprise
    if g_uniform is not None:
        scale = scale + g_uniform
        offset = offset - g_uniform / vocabulary
        own = own + g_uniform * (p_y - 1 / vocabulary)
    if g_squares is not None:
        assert saved.sum_p_squared is not None
        scale = scale - 2 * g_squares * saved.sum_p_squared
        quadratic = 2 * g_squares / saved.z.square()
        own = own + 2 * g_squares * p_y * (p_y - saved.sum_p_squared)
    rows = [scale / saved.z, slope / saved.z, own]
    if options.distance:
        rows.append(offset)
    if options.squares:
        rows.append(quadratic)
    if inverse_temperature_N is not None:
        rows = [row * inverse_temperature_N for row in rows]
    elif options.temperature != 1:
        rows = [row / options.temperature for row in rows]
    return torch.stack([saved.maximum, *rows])


def refuse_second_derivative() -> None:
    """Raise RuntimeError under create_graph=True: torch would quietly treat it as a constant."""
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError(
            "the InfoEntropy loss has no second derivative; call backward or torch.autograd.grad "
            "without create_graph=True"
        )


def vocab_parallel_statistics(
    logits: torch.Tensor,
    target: torch.Tensor,
    *,
    group: Group | None = None,
    vocab_size: int | None = None,
    ignore_index: int = -100,
    softcap: float | None = None,
    temperature: float | torch.Tensor = 1.0,
    uniform_cross_entropy: bool = False,
    sum_p_squared: bool = False,
    backend: Backend = "auto",
    collective: Collective = "gather",
    inplace_backward: bool = False,
) -> TokenStatistics:
    """Cross entropy, entropy and log-sum-exp of every token, each differentiable.

    Args:
        logits: [..., V/T], this rank's shard of the vocabulary, in rank order over `group`; any
            floating dtype. Leading dimensions may be transposed without a copy. A plain tensor, or
            a DTensor that is sharded evenly along its last dimension over `group` alone.
        target: [...], integer ids in the whole vocabulary.
        group: the tensor-parallel group the vocabulary is split over; None where it is not. All its
            shards must be equally wide: pad the last, and name `vocab_size`.
        vocab_size: true vocabulary size where the table is padded: columns at or beyond it never
            enter the softmax or the entropy, and their gradient is exactly 0.
        ignore_index: tokens with this target get 0 everywhere and a gradient of exactly 0.
        softcap: replaces a logit z by softcap tanh(z / softcap) before anything else; logits of
            -inf stay masked.
        temperature: divides the (capped) logits; a number, or a tensor [...] in the target's
            shape with one a token, which gets no gradient.
        uniform_cross_entropy: also give -mean ln p over the true vocabulary, which label smoothing
            needs: 4 bytes a token more than 16 are gathered.
        sum_p_squared: also give sum p^2, for 4 bytes more.
        backend: "auto" or the name of one (`kernels.dispatch`). A named backend never falls back.
        collective: "gather" (one all-gather, bitwise equal on all ranks) or "all_reduce".
        inplace_backward: write the gradient over the logits, which saves one tensor of their size.
            Only for logits that nothing else reads; a second backward pass raises.

    Returns:
        TokenStatistics, each [...] fp32 (fp64 for fp64 logits).

    Raises:
        ValueError: shapes, dtypes or sizes that do not fit together, tensors that are not plain
            ones (`kernels.ops.require_plain`); on a CPU also a target that is
            outside the vocabulary (on a GPU, where a look would stall the device, its cross
            entropy is NaN).
        RuntimeError: the named backend cannot run on these logits.
    """
    logits = layout.local_shard(logits, -1, group)
    layout.check_logits(logits, target, inplace_backward)
    arguments = StatisticsArguments(
        *(group, vocab_size, ignore_index, softcap, temperature),
        *(uniform_cross_entropy, sum_p_squared, backend, collective),
    )
    settings = layout.make_settings(
        logits, logits.shape[-1], arguments, inplace_backward=inplace_backward
    )
    rows = layout.as_rows(logits, target)
    layout.check_targets(rows.target_N, settings.vocabulary.size, ignore_index)
    inverse = layout.inverse_temperature(temperature, target, statistics_dtype(logits))
    inverse_N = None if inverse is None else rows.flatten(inverse)
    results: Any = _Statistics.apply(rows.logits_NV, rows.target_N, inverse_N, settings)
    return TokenStatistics.of_present(
        (rows.restore(result, target) for result in results),
        uniform=uniform_cross_entropy,
        squares=sum_p_squared,
    )


class _Statistics(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits_NV: torch.Tensor,
        target_N: torch.Tensor,
        inverse_temperature_N: torch.Tensor | None,
        settings: Settings,
    ) -> tuple[torch.Tensor, ...]:
        ctx.set_materialize_grads(False)
        (size, shard, columns), options = settings.vocabulary, settings.options
        statistics_RN = settings.kernels.statistics(logits_NV, target_N, inverse_temperature_N)
        row = start_join(statistics_RN, settings.group, settings.collective, columns, options)()
        results, saved = token_results(row, target_N, size, shard.ignore_index, options)
        ctx.save_for_backward(logits_NV, target_N, inverse_temperature_N, *saved)
        ctx.settings, ctx.overwritten = settings, False
        ctx.mark_non_differentiable(results.is_top)
        return results.present()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        refuse_second_derivative()
        if ctx.overwritten:
            raise RuntimeError(
                "the logits of this loss were overwritten by their gradient in an earlier backward "
                "pass; pass inplace_backward=False to run backward more than once"
            )
        logits_NV, target_N, inverse_temperature_N, *kept = ctx.saved_tensors
        settings: Settings = ctx.settings
        options, upstream = settings.options, upstream_of(gradients, settings.options)
        coefficients_RN = coefficients(
            *(upstream, Saved(*kept), settings.vocabulary.size, options, inverse_temperature_N)
        )
        inplace = settings.inplace_backward and not torch.compiler.is_compiling()
        out_NV = settings.kernels.gradient(
            logits_NV, target_N, coefficients_RN, inverse_temperature_N, inplace=inplace
        )
        if inplace:
            ctx.overwritten = True
            # The kernels write through raw pointers, which torch cannot see: say so, so that
            # anything else that saved these logits raises instead of reading a gradient.
            torch.autograd.graph.increment_version(logits_NV)
        return out_NV, None, None, None
