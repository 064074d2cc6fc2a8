"""What a weighting is shown: every token of one micro-batch on one rank.

The module is a door for users: the argument of a weighting of their own, with what it may need to
compare tokens. `loss.weighting` calls such a function.
"""

from dataclasses import dataclass, replace

import torch

from megatron_infoentropy.loss.collective import Group, sum_over_group
from megatron_infoentropy.loss.statistics import TokenStatistics


@dataclass(frozen=True, eq=False)
class TokenBatch:
    """The tokens of one micro-batch on one rank; tensors in the target's shape [...].

    In the functions of the loss that is the shape of the target they are given, in the trainer
    [batch, sequence], in the drop-in [sequence, batch]. Statistics are fp32 (fp64 for fp64 logits)
    and constants in the backward pass, unless `config.detach_weight` is off. Tokens that are left
    out have mask 0, and statistics of 1 rather than of 0, at which many functions are singular.
    """

    cross_entropy: torch.Tensor  # nats
    entropy: torch.Tensor  # nats, of the predicted distribution
    logsumexp: torch.Tensor
    is_top: torch.Tensor  # bool: no logit is above the target's
    sum_p_squared: torch.Tensor | None  # of the predicted distribution; only for deft
    mask: torch.Tensor  # loss mask, 0 to 1; multiplies the weight afterwards
    target: torch.Tensor | None = None  # int64, ids in the whole vocabulary
    samples: int = 0  # training samples (sequences) consumed before this step, for curricula
    token_input: torch.Tensor | None = None  # what the caller of the loss handed over as such
    data_parallel_group: Group | None = None  # ranks that hold other tokens of this step

    def sum_over_ranks(self, value: torch.Tensor) -> torch.Tensor:
        """Return the sum of a tensor over the data-parallel ranks, which must all call this."""
        return sum_over_group(value, self.data_parallel_group)

    def mean(self, values: torch.Tensor) -> torch.Tensor:
        """Return the mean of [...] over the valid tokens of all data-parallel ranks, a scalar."""
        valid = self.mask != 0
        sums = torch.stack([torch.where(valid, values, 0).sum(), valid.sum().to(values.dtype)])
        total, count = self.sum_over_ranks(sums).unbind(0)
        return total / count.clamp_min(1)

    def quantile(self, values: torch.Tensor, share: float) -> torch.Tensor:
        """Return the least value that has `share` of this rank's valid tokens below it, a scalar.

        No value is looked at by the host, so that a GPU does not stall. NaN without valid tokens.
        """
        valid = (self.mask != 0).flatten()
        # Tokens that are left out lie behind all others.
        ordered = torch.where(valid, values.flatten(), torch.inf).sort().values
        if not ordered.numel():
            return ordered.new_full((), torch.nan)
        count = valid.sum()
        index = torch.minimum((count.double() * share).round().long(), count - 1).clamp_min(0)
        value = ordered.index_select(0, index.view(1)).squeeze(0)
        return torch.where(count > 0, value, torch.nan)

    def uniform(self) -> torch.Tensor:
        """Return pseudo-random numbers in [0, 1), one a token, the same wherever a step is rerun.

        They depend on the samples consumed, the token's place and its target alone, so that
        tensor-parallel ranks and a resumed run draw the same ones.
        """
        index = torch.arange(self.mask.numel(), device=self.mask.device).view(self.mask.shape)
        bits = index + (self.samples % _PRIME) * 40_503
        if self.target is not None:
            bits = bits + self.target.clamp_min(0) * 2_654_435
        for _ in range(3):  # rounds of a 32-bit integer hash; 59 bits at most are in use
            bits = bits & 0xFFFFFFFF
            bits = (bits ^ (bits >> 16)) * _MULTIPLIER
        return ((bits >> 8) & 0xFFFFFF).to(self.cross_entropy.dtype) / 2**24

    def detached(self) -> "TokenBatch":
        """Return the batch with its statistics as constants."""
        squares = self.sum_p_squared
        return replace(
            self,
            cross_entropy=self.cross_entropy.detach(),
            entropy=self.entropy.detach(),
            logsumexp=self.logsumexp.detach(),
            sum_p_squared=None if squares is None else squares.detach(),
        )

    def prepared(self, detach: bool) -> "TokenBatch":
        """Return the batch as a weighting is shown it: see the class."""
        batch, valid = self.detached() if detach else self, self.mask != 0
        return replace(
            batch,
            cross_entropy=torch.where(valid, batch.cross_entropy, 1),
            entropy=torch.where(valid, batch.entropy, 1),
            logsumexp=torch.where(valid, batch.logsumexp, 1),
            is_top=batch.is_top.bool() & valid,
        )


_PRIME = 2_147_483_647
_MULTIPLIER = 0x45D9F3B


def token_batch(
    statistics: TokenStatistics,
    mask: torch.Tensor | None = None,
    *,
    target: torch.Tensor | None = None,
    samples: int = 0,
    token_input: torch.Tensor | None = None,
    data_parallel_group: Group | None = None,
) -> TokenBatch:
    """Return the batch of tokens with these statistics; without a mask all are valid.

    Raises:
        ValueError: a `token_input` of another shape.
    """
    ce = statistics.cross_entropy
    if token_input is not None and token_input.shape != ce.shape:
        raise ValueError(
            f"expected token_input in the target's shape {list(ce.shape)}, one number a token, got "
            f"{list(token_input.shape)}"
        )
    return TokenBatch(
        cross_entropy=ce,
        entropy=statistics.entropy,
        logsumexp=statistics.logsumexp,
        is_top=statistics.is_top,
        sum_p_squared=statistics.sum_p_squared,
        mask=torch.ones_like(ce, requires_grad=False) if mask is None else mask.to(ce.dtype),
        target=target,
        samples=samples,
        token_input=token_input,
        data_parallel_group=data_parallel_group,
    )
