"""What is measured: each provider is a function from logits and targets to a scalar to minimise.

`paper_eager` is the published training code's loss written in plain PyTorch, `megatron` is
Megatron-Core's own cross entropy, both without tensor parallelism.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F

from megatron_infoentropy import InfoEntropyConfig, infoentropy_loss
from megatron_infoentropy.kernels import native

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

    # Megatron works in place on fp32 logits: the copy is part of what it costs a caller who keeps
    # them, so hand it the tensor itself, as its trainer does.
    group = torch.distributed.group.WORLD
    return vocab_parallel_cross_entropy(logits, target, tp_group=group).mean()


def infoentropy(backend: str) -> Provider:
    config = InfoEntropyConfig(backend=backend)  # type: ignore[arg-type]

    def loss(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return infoentropy_loss(logits, target, config)

    return loss


def available(device: torch.device, dtype: torch.dtype) -> dict[str, Provider]:
    """Providers that run here, ours first."""
    found: dict[str, Provider] = {}
    if native.why_unavailable(device, dtype) is None:
        found["infoentropy native"] = infoentropy("native")
    found["infoentropy reference"] = infoentropy("reference")
    found["torch cross_entropy"] = torch_cross_entropy
    found["megatron cross_entropy"] = megatron_cross_entropy
    found["paper eager"] = paper_eager
    return found
