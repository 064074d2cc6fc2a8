"""The losses that are measured: each makes a scalar to minimise of a shard of logits and targets.

A provider is made for a setting and may refuse it; what refused is listed with its reason, so that
nothing is silently absent. Everybody else's loss is measured as its users call it, and its package
imported only then: `paper eager` is the published training code's loss written in plain PyTorch;
`megatron unfused` and `megatron fused` are Megatron-Core's own two, `fused` compiled by torch as
its users get it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F

from megatron_infoentropy import InfoEntropyConfig, infoentropy_loss
from megatron_infoentropy.bench.cases import Case
from megatron_infoentropy.kernels import dispatch

Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
Computes = Literal["infoentropy", "cross entropy", "label smoothing", "softcap"]

LABEL_SMOOTHING = 0.1
SOFTCAP = 30.0
REASON_CHARACTERS = 160


class Unavailable(Exception):
    """A provider cannot take part; says why, in a few words."""


def failure(error: Exception) -> str:
    """The reason of something that was tried and failed, in one line."""
    text = " ".join(str(error).split())
    return f"it failed: {type(error).__name__}: {text}"[:REASON_CHARACTERS]


@dataclass(frozen=True)
class Setting:
    """The case, device and ranks that a provider is made for."""

    case: Case
    device: torch.device
    group: dist.ProcessGroup  # of case.tensor_parallel ranks, also where that is one
    compiled: bool  # whether providers that torch.compile makes take part

    @property
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = getattr(torch, self.case.dtype)
        return dtype

    @property
    def ranks(self) -> dist.ProcessGroup | None:
        """The ranks that wait for one another, if there are several."""
        return self.group if self.case.tensor_parallel > 1 else None

    def refuse_shards(self) -> None:
        """For providers that need whole rows."""
        if self.case.tensor_parallel > 1:
            raise Unavailable("it has no tensor parallelism")

    def refuse_uncompiled(self) -> None:
        """For providers that torch compiles."""
        if not self.compiled:
            raise Unavailable("compiled providers were left out (--no-compiled)")


@dataclass(frozen=True)
class Provider:
    """One way to compute a loss; `make` raises Unavailable where it cannot run."""

    name: str
    make: Callable[[Setting], Loss]
    computes: Computes = "cross entropy"
    is_ours: bool = False
    gradient_in_forward: bool = False


def ours(setting: Setting) -> list[Provider]:
    """Every backend, writing the gradient into new memory and over the logits, best first; then,
    with the best of them in place, what the entropy, each option and the other collective cost."""
    every = []
    for backend, reason in backends(setting).items():
        of_backend = partial(_ours, computes="infoentropy", backend=backend, reason=reason or "")
        every += [of_backend(backend, inplace=False), of_backend(in_place(backend))]
    name = in_place(best_backend(setting))
    every += [
        _ours(f"{name} (cross entropy)", "cross entropy", objective="cross_entropy"),
        _ours(f"{name} (label smoothing)", "label smoothing", label_smoothing=LABEL_SMOOTHING),
        _ours(f"{name} (softcap)", "softcap", softcap=SOFTCAP),
    ]
    if setting.case.tensor_parallel > 1:
        every.append(_ours(f"{name} (all_reduce)", "infoentropy", collective="all_reduce"))
    return every


def backends(setting: Setting) -> dict[str, str | None]:
    """Every backend by name, best first: None where it can be measured, else why not."""
    reasons = dispatch.unavailable(setting.device, setting.dtype)
    if setting.device.type == "cpu" and reasons.get("triton", "") is None:
        reasons["triton"] = "its kernels would be interpreted here (TRITON_INTERPRET)"
    return reasons


def best_backend(setting: Setting) -> str:
    """The backend that "auto" chooses."""
    return next(name for name, reason in backends(setting).items() if reason is None)


def in_place(backend: str) -> str:
    """The name of the provider that writes the gradient over the logits, as our trainer does."""
    return f"{backend} in place"


class _Computed(torch.autograd.Function):
    """Pretends that a model computed the logits of two things, its hidden states and its
    table: in place refuses a leaf, its views and what comes of it alone."""

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        source = logits.detach()
        return logits.new_empty(0).set_(  # not a view, as far as autograd knows
            source.untyped_storage(), source.storage_offset(), source.size(), source.stride()
        )

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradient, None


def _ours(
    name: str, computes: Computes, *, inplace: bool = True, reason: str = "", **settings: Any
) -> Provider:
    def make(setting: Setting) -> Loss:
        if reason:
            raise Unavailable(reason)
        config = InfoEntropyConfig(**settings)
        table = torch.empty(0, requires_grad=True)

        def loss(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
            return infoentropy_loss(
                _Computed.apply(logits, table),
                target,
                config,
                group=setting.group,
                inplace_backward=inplace,
            )

        return loss

    return Provider(name, make, computes, is_ours=True)


def peers() -> list[Provider]:
    """All of them, whether or not they are installed."""
    return [
        Provider("torch", _whole_rows(F.cross_entropy)),
        Provider("torch compiled", _whole_rows(_cross_entropy, compiled=True)),
        Provider("megatron unfused", _megatron_unfused),
        Provider("megatron fused", _megatron_fused),
        *(
            Provider(
                name,
                partial(_for_gpus, *path_and_call, shards=name not in WITHOUT_SHARDS),
                "infoentropy" if name == "trl" else "cross entropy",
                gradient_in_forward=name == "liger",
            )
            for name, path_and_call in FOR_GPUS.items()
        ),
        Provider("paper eager", _whole_rows(paper_loss), "infoentropy"),
        Provider("paper compiled", _whole_rows(paper_loss, compiled=True), "infoentropy"),
    ]


def _whole_rows(loss: Loss, *, compiled: bool = False) -> Callable[[Setting], Loss]:
    def make(setting: Setting) -> Loss:
        setting.refuse_shards()
        if not compiled:
            return loss
        setting.refuse_uncompiled()
        made: Loss = torch.compile(loss, dynamic=False)
        return made

    return make


def _cross_entropy(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits, target)


def paper_loss(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """The published formula step by step, the probability clamp at 1e-8 included; gamma 1."""
    ce = F.cross_entropy(logits, target, reduction="none")
    p = logits.detach().softmax(-1).clamp(1e-8, 1.0)
    weight = 1 + -(p * p.log()).sum(-1)
    return (ce * weight / weight.mean()).mean()


def _megatron_unfused(setting: Setting) -> Loss:
    from megatron.core.tensor_parallel.cross_entropy import vocab_parallel_cross_entropy as theirs

    # Overwrites fp32 logits by their softmax and that by the gradient, as in its trainer.
    return lambda logits, target: theirs(logits, target, tp_group=setting.group).mean()


def _megatron_fused(setting: Setting) -> Loss:
    from megatron.core.fusions.fused_cross_entropy import fused_vocab_parallel_cross_entropy

    setting.refuse_uncompiled()
    return lambda z, y: fused_vocab_parallel_cross_entropy(z, y, setting.group).mean()


def _trl(one_pass: Any, setting: Setting, z: torch.Tensor, y: torch.Tensor) -> Any:
    """TRL's one pass for log-probability and entropy, weighted as the paper does."""
    log_p, entropy = one_pass(z, y)
    weight = 1 + entropy.detach()
    return -(weight * log_p).sum() / weight.sum()


# Packages for GPUs: name -> (what they have for it, how its users call that for a setting, logits
# [tokens, columns] and target). Transformer Engine and Liger's for Megatron take [sequence, batch].
FOR_GPUS: dict[str, tuple[str, Callable[[Any, Setting, torch.Tensor, torch.Tensor], Any]]] = {
    "transformer engine": (
        "transformer_engine.pytorch.cross_entropy.parallel_cross_entropy",
        lambda f, s, z, y: f(z[:, None], y[:, None], dist_process_group=s.group).mean(),
    ),
    "transformer engine in place": (  # by a word that releases before it do not know
        "transformer_engine.pytorch.cross_entropy.parallel_cross_entropy",
        lambda f, s, z, y: f(
            z[:, None], y[:, None], dist_process_group=s.group, overwrite_input=True
        ).mean(),
    ),
    "liger": (
        "liger_kernel.transformers.cross_entropy.LigerCrossEntropyLoss",
        lambda f, s, z, y: f()(z, y),
    ),
    "liger vocab-parallel": (
        "liger_kernel.megatron.cross_entropy.LigerMegatronCrossEntropy",
        lambda f, s, z, y: f()(z[:, None], y[:, None], s.group).mean(),
    ),
    "flash-attn": (
        "flash_attn.ops.triton.cross_entropy.cross_entropy_loss",
        lambda f, s, z, y: f(z, y, inplace_backward=True, process_group=s.ranks)[0].mean(),
    ),
    "quack": (
        "quack.cross_entropy.cross_entropy",
        lambda f, s, z, y: f(z, y, reduction="none", inplace_backward=True).mean(),
    ),
    "trl": ("trl.kernels.logprob_entropy.selective_log_softmax_and_entropy", _trl),
}
WITHOUT_SHARDS = ("liger", "quack", "trl")


def _for_gpus(path: str, call: Callable[..., Any], setting: Setting, *, shards: bool) -> Loss:
    """Return the loss of a package for GPUs: what it has at this path, called so."""
    if not shards:
        setting.refuse_shards()
    if setting.device.type != "cuda":
        raise Unavailable("its kernels need a GPU")
    module, _, name = path.rpartition(".")
    try:
        return partial(call, getattr(import_module(module), name), setting)
    except ImportError as error:
        package = module.partition(".")[0]
        if isinstance(error, ModuleNotFoundError) and error.name == package:
            raise Unavailable("it is not installed") from None
        raise Unavailable(f"it cannot be imported ({error})") from None
