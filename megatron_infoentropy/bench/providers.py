"""What is measured: each provider is a function from logits and targets to a scalar to minimise.

`paper_eager` is the published training code's loss written in plain PyTorch, `megatron` is
Megatron-Core's own cross entropy, both without tensor parallelism.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F

from megatron_infoentropy import InfoEntropyConfig, infoentropy_loss
from megatron_infoentropy.kernels import native

OURS = ("native", "native in place")  # what the others are compared with

Provider = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def paper_eager(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """The published formula step by step, the probability clamp at 1e-8 included; gamma 1."""
    ce = F.cross_entropy(logits, target, reduction="none")
    p = logits.detach().softmax(-1).clamp(1e-8, 1.0)
    weight = 1 + -(p * p.log()).sum(-1)
    return (ce * weight / weight.mean()).mean()


def torch_cross_entropy(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits, target)


def megatron_cross_entropy(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    from megatron.core.tensor_parallel.cross_entropy import vocab_parallel_cross_entropy

    # Overwrites fp32 logits by their softmax and that by the gradient, as in Megatron's trainer.
    group = torch.distributed.group.WORLD
    losses: torch.Tensor = vocab_parallel_cross_entropy(logits, target, tp_group=group)
    return losses.mean()


def infoentropy(backend: str, *, inplace: bool = False) -> Provider:
    """Ours; in place the gradient replaces the logits, as in our trainer."""
    config = InfoEntropyConfig(backend=backend)  # type: ignore[arg-type]

    def loss(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        computed = logits.view_as(logits)  # in place needs logits that are not a leaf
        return infoentropy_loss(computed, target, config, inplace_backward=inplace)

    return loss


def available(device: torch.device, dtype: torch.dtype) -> dict[str, Provider]:
    """Providers that run here, ours first."""
    found: dict[str, Provider] = {}
    if native.why_unavailable(device, dtype) is None:
        found[OURS[0]] = infoentropy("native")
        found[OURS[1]] = infoentropy("native", inplace=True)
    found["reference"] = infoentropy("reference")
    found["torch cross_entropy"] = torch_cross_entropy
    found["megatron cross_entropy"] = megatron_cross_entropy
    found["paper eager"] = paper_eager
    return found
