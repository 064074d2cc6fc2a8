"""The truth: the loss in dense float64, from its definition. Shares no code with the package."""

import torch


def dense_statistics(
    logits: torch.Tensor, target: torch.Tensor, ignore_index: int = -100
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(cross entropy, entropy, log-sum-exp) by autograd-friendly float64, whole vocabulary."""
    z = logits.double()
    lse = z.logsumexp(-1)
    log_p = z - lse.unsqueeze(-1)
    p = log_p.exp()
    entropy = -(p * log_p.masked_fill(p == 0, 0)).sum(-1)
    ignored = target == ignore_index
    ce = -log_p.gather(-1, target.masked_fill(ignored, 0).unsqueeze(-1)).squeeze(-1)
    zero = torch.zeros_like(lse)
    return (
        torch.where(ignored, zero, ce),
        torch.where(ignored, zero, entropy),
        torch.where(ignored, zero, lse),
    )


def uniform_cross_entropy(logits: torch.Tensor) -> torch.Tensor:
    """-mean ln p over the vocabulary: what label smoothing mixes in."""
    return -logits.double().log_softmax(-1).mean(-1)


def meant(
    logits: torch.Tensor, softcap: float | None = None, temperature: float = 1.0
) -> torch.Tensor:
    """The logits a model with a softcap and a temperature means; a mask of -inf stays one."""
    z = logits.double()
    if softcap is not None:
        z = (softcap * (z / softcap).tanh()).masked_fill(z == -torch.inf, -torch.inf)
    return z / temperature


def dense_weight(
    ce: torch.Tensor, entropy: torch.Tensor, objective: str, gamma: float, sigma: float
) -> torch.Tensor:
    if objective == "infoentropy":
        return (sigma + entropy) ** gamma
    if objective == "focal":
        return (1 - (-ce).exp()) ** gamma
    return torch.ones_like(ce)


def dense_objective(
    batches: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]],
    *,
    objective: str = "infoentropy",
    gamma: float = 1.0,
    sigma: float = 1.0,
    normalization: str = "paper",
    detach: bool = True,
) -> torch.Tensor:
    """The loss of one micro-batch step; `batches` are (logits, target, mask), one a data rank."""
    weighted, weights, counts, inverse = [], [], [], []
    for logits, target, mask in batches:
        ce, entropy, _ = dense_statistics(logits, target)
        w = dense_weight(ce, entropy, objective, gamma, sigma)
        w = w.detach() if detach else w
        mask = mask.double() * (target != -100)
        weighted.append((mask * w * ce).sum())
        weights.append((mask * w).sum())
        counts.append(mask.sum())
        if mask.sum() > 0:
            inverse.append(mask.sum() / (mask * w).sum())
    total = sum(weighted)
    if normalization == "global":
        return total / sum(weights)
    mean = total / sum(counts)
    return mean * sum(inverse) / len(inverse) if normalization == "paper" else mean


def published_code(logits: torch.Tensor, target: torch.Tensor, gamma: float) -> torch.Tensor:
    """What the published training code computes on one rank: clamped probabilities, sigma 1."""
    ce = torch.nn.functional.cross_entropy(logits, target, reduction="none", ignore_index=-100)
    p = logits.detach().softmax(-1).clamp(1e-8, 1.0)
    weight = (1 - (p * p.log()).sum(-1)) ** gamma
    return (ce * weight / weight.mean()).mean()
