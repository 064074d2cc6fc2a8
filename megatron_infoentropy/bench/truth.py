"""What a provider should compute, in float64 from the very same logits.

A fast wrong number is worth nothing, so every provider's loss, and its gradient at a few rows, are
compared with this before it is timed.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist

from megatron_infoentropy.bench.providers import LABEL_SMOOTHING, SOFTCAP, Computes

CHUNK_BYTES = 1 << 27  # of one float64 temporary
PROBED_ROWS = 16
LOSS_TOLERANCE = 0.02  # of the loss: bf16 losses and the published clamp pass, mistakes do not
GRADIENT_TOLERANCE = 0.05  # of the largest entry


@dataclass(frozen=True)
class Errors:
    """Of one provider: of its loss (nats), and of its gradient, relative to the largest entry."""

    loss: float
    gradient: float
    are_too_large: bool


class Truth:
    """Losses and probed gradient rows of every quantity, from this rank's shard of the logits."""

    def __init__(self, logits: torch.Tensor, target: torch.Tensor, group: dist.ProcessGroup):
        self._logits, self._target, self._group = logits, target, group
        probed = torch.linspace(0, len(target) - 1, PROBED_ROWS, dtype=torch.float64)
        self._rows = probed.long().to(target.device)
        self._known: dict[Computes, tuple[float, torch.Tensor]] = {}

    def errors(self, computes: Computes, loss: torch.Tensor, gradient: torch.Tensor) -> Errors:
        """Of a provider's loss and of its gradient [tokens, columns] of this rank's shard."""
        if computes not in self._known:
            self._known[computes] = self._loss_and_rows(computes)
        true_loss, true_rows = self._known[computes]
        start = self._group.rank() * gradient.shape[-1]
        true_rows = true_rows[:, start : start + gradient.shape[-1]]
        difference = (gradient[self._rows].double() - true_rows).abs().max()
        loss_error = abs(float(loss) - true_loss)
        gradient_error = float(difference / true_rows.abs().max())
        right = loss_error <= LOSS_TOLERANCE * abs(true_loss)
        right = right and gradient_error <= GRADIENT_TOLERANCE  # also false where NaN
        return Errors(loss_error, gradient_error, not right)

    def _loss_and_rows(self, computes: Computes) -> tuple[float, torch.Tensor]:
        """(loss, gradient [PROBED_ROWS, vocabulary]); all tokens' weights normalise both."""
        total, weights = 0.0, 0.0
        for rows in self._chunks():
            ce, weight = _per_token(self._whole(rows), self._target[rows], computes)
            total, weights = total + float((weight * ce).sum()), weights + float(weight.sum())
        leaf = self._whole(self._rows).requires_grad_()
        ce, weight = _per_token(leaf, self._target[self._rows], computes)
        (gradient,) = torch.autograd.grad((weight.detach() * ce).sum() / weights, leaf)
        return total / weights, gradient

    def _chunks(self) -> list[torch.Tensor]:
        row_bytes = 8 * self._logits.shape[-1] * self._group.size()
        count = len(self._target)
        every = torch.arange(count, device=self._target.device)
        return list(torch.split(every, max(1, CHUNK_BYTES // row_bytes)))

    def _whole(self, rows: torch.Tensor) -> torch.Tensor:
        """Whole rows in float64, the shards of all ranks side by side."""
        mine = self._logits[rows]
        if self._group.size() == 1:
            return mine.double()
        shards = [torch.empty_like(mine) for _ in range(self._group.size())]
        dist.all_gather(shards, mine, group=self._group)
        return torch.cat(shards, -1).double()


def _per_token(
    z: torch.Tensor, target: torch.Tensor, computes: Computes
) -> tuple[torch.Tensor, torch.Tensor]:
    """(cross entropy, weight) of whole rows."""
    if computes == "softcap":
        z = SOFTCAP * (z / SOFTCAP).tanh()
    log_p = z.log_softmax(-1)
    ce = -log_p.gather(-1, target.unsqueeze(-1)).squeeze(-1)
    if computes == "label smoothing":
        ce = (1 - LABEL_SMOOTHING) * ce - LABEL_SMOOTHING * log_p.mean(-1)
    if computes == "cross entropy":
        return ce, torch.ones_like(ce)
    return ce, 1 - (log_p.exp() * log_p).sum(-1)
