"""Logits that are hard to get right, and what float64 says of them."""

from typing import NamedTuple

import torch
from oracle import dense_statistics

BATCH, SEQUENCE, VOCAB, PADDED = 2, 8, 500, 512
KINDS = ("plain", "shifted", "masked", "confident")


class Truth(NamedTuple):
    logprob: torch.Tensor  # [b, s], as the two below float64
    entropy: torch.Tensor
    gradient: torch.Tensor  # [b, s, V] of sum(up_logprob logprob + up_entropy entropy)


def logits_of(kind: str, dtype: torch.dtype) -> torch.Tensor:
    """[b, s, PADDED]; "shifted" by 200, "masked" with half of the entries -inf."""
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(BATCH, SEQUENCE, PADDED, generator=generator)
    if kind == "shifted":
        logits += 200
    if kind == "confident":
        logits[..., 3] += 20
    if kind == "masked":
        hidden = torch.rand(logits.shape, generator=generator) < 0.5
        hidden.scatter_(-1, target_of().unsqueeze(-1), False)
        hidden[0, 0, PADDED // 2 :] = True  # a shard without any
        hidden[0, 0, 0] = False
        logits.masked_fill_(hidden, -torch.inf)
    return logits.to(dtype)


def target_of() -> torch.Tensor:
    """[b, s], ids below VOCAB; the first lies in the first shard of two."""
    target = torch.randint(VOCAB, (BATCH, SEQUENCE), generator=torch.Generator().manual_seed(1))
    target[0, :2] = torch.tensor([1, 3])
    return target


def kept(logits: torch.Tensor) -> torch.Tensor:
    """A keep mask of a few of the largest; often without the target, none in one row."""
    keep = logits >= logits.float().topk(20).values[..., -1:].to(logits)
    keep[0, -1] = False
    return keep


def with_target(keep: torch.Tensor) -> torch.Tensor:
    """The same mask, the target of every row kept."""
    return keep.scatter(-1, target_of().unsqueeze(-1), True)


def upstream() -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of some objective by log-probability and by entropy, [b, s] each."""
    ups = torch.randn(2, BATCH, SEQUENCE, generator=torch.Generator().manual_seed(2))
    return ups[0], ups[1]


def truth_of(
    logits: torch.Tensor,
    *,
    temperature: float | torch.Tensor = 1.0,
    vocab_size: int = PADDED,
    keep: torch.Tensor | None = None,
    take_part: torch.Tensor | None = None,
    entropy_gradient: bool = True,
) -> Truth:
    """From the definition, in float64, whole vocabulary."""
    leaf = logits.double().requires_grad_()
    real = leaf[..., :vocab_size] / torch.as_tensor(temperature).double().unsqueeze(-1)
    target = target_of()
    if take_part is not None:
        target = target.masked_fill(~take_part, -100)
    ce, entropy, _ = dense_statistics(real, target)
    if keep is not None:
        ce, *_ = dense_statistics(real.masked_fill(~keep, -torch.inf), target)
    of_entropy = entropy if entropy_gradient else entropy.detach()
    by_logprob, by_entropy = (up.double() for up in upstream())
    objective = by_logprob * -ce + by_entropy * of_entropy
    # Entries of -inf have no gradient; autograd makes NaN of them.
    (gradient,) = torch.autograd.grad(objective.sum(), leaf)
    gradient = torch.where(leaf == -torch.inf, 0, gradient)
    return Truth(-ce.detach(), entropy.detach(), gradient)
