"""A token's loss and its weight, from the statistics of the predicted distribution."""

import importlib
import math
import sys
from collections.abc import Callable
from inspect import signature
from typing import Any

import torch

from megatron_infoentropy.config import COMPARING, InfoEntropyConfig
from megatron_infoentropy.loss.statistics import TokenStatistics
from megatron_infoentropy.loss.token_batch import TokenBatch

LEAST_WEIGHT = 2.0**-100  # a smaller one is not inverted: times a long sequence it overflows fp32
EAFT_ENTROPY = math.log(20)  # nats; the entropy of the 20 largest logits lies below it


def token_weight(batch: TokenBatch, config: InfoEntropyConfig) -> torch.Tensor:
    """The weight w >= 0 of every token, in the target's shape, before normalisation.

    By `config.objective`, with H the entropy, p = e^-ce the target's probability and q the
    `config.quantile` of the entropies of this rank's tokens:

        infoentropy   (sigma + H)^gamma    published: sigma 1, gamma 1
        focal         (1 - p)^gamma        lin_focal: the same, differentiated
        eaft          (H / ln 20)^gamma    published (arXiv 2601.02151): H of the 20 largest logits
        dft           p^gamma              published (arXiv 2508.05629): gamma 1
        deft          p^S, S = sum p_i^2   published (arXiv 2602.11424): by its gradient, below
        eslm          1 if H >= q else 0   published (arXiv 2505.19893)
        entrodrop     1 if H >= q, else 0 with probability gamma (after arXiv 2512.23422)
        custom        the configuration's own function

    deft is published as the loss (1 - p^S) / S with a constant S, whose gradient is that of w ce
    with the constant w = p^S. Then mixed with 1 by config.blend. A constant in the backward pass
    where `config.detach_weight`. The weight is not multiplied by the mask, but finite where that is
    0.

    Raises:
        ValueError: a custom function cannot be loaded, returns another shape or, on a CPU, a
            negative weight (on a GPU, where a look would stall the device, that weight is NaN).
    """
    if not config.is_weighted:
        return torch.ones_like(batch.cross_entropy, requires_grad=False)
    if config.objective in COMPARING:
        shown = batch.prepared(config.detach_weight)
        weight = _comparing_weight(shown, config)
    else:
        weight = _power(batch.detached() if config.detach_weight else batch, config)
    return torch.lerp(weight, torch.ones_like(weight), config.blend) if config.blend else weight


def _power(batch: TokenBatch, config: InfoEntropyConfig) -> torch.Tensor:
    ce, entropy = batch.cross_entropy, batch.entropy
    if config.objective == "deft":
        assert batch.sum_p_squared is not None
        return torch.exp(-batch.sum_p_squared * ce)
    if config.objective == "dft":
        return torch.exp(-config.gamma * ce)
    if config.objective == "infoentropy":
        base = entropy + config.sigma
    elif config.objective == "eaft":
        base = entropy / EAFT_ENTROPY
    else:  # 1 - e^-ce by expm1, so that it keeps its digits for confident tokens
        base = -torch.expm1(-ce)
    if config.gamma < 1 and not config.detach_weight:
        # The power's slope is infinite at 0; such a token's weight is held constant.
        base = base.clamp_min(LEAST_WEIGHT)
    return base**config.gamma


def _comparing_weight(batch: TokenBatch, config: InfoEntropyConfig) -> torch.Tensor:
    """The weight where it depends on other tokens than the own; 0 where the mask is."""
    valid = batch.mask != 0
    if config.objective == "custom":
        return _checked(torch.where(valid, _call_function(batch, config.weighting), 0), config)
    keeps = batch.entropy >= batch.quantile(batch.entropy, config.quantile)
    if config.objective == "entrodrop":
        keeps = keeps | (batch.uniform() >= config.gamma)
    # A NaN must not vanish as a token that is left out.
    weight = torch.where(batch.entropy.isnan(), batch.entropy, keeps.to(batch.entropy.dtype))
    return torch.where(valid, weight, 0)


def _checked(weight: torch.Tensor, config: InfoEntropyConfig) -> torch.Tensor:
    negative = weight < 0
    if torch.compiler.is_compiling() or weight.device.type != "cpu":
        return weight.masked_fill(negative, torch.nan)
    if negative.any():
        raise ValueError(
            f"weighting {config.weighting!r} gave {int(negative.sum())} negative weight(s), the "
            f"least is {float(weight.min())}; weights must be >= 0: clamp them"
        )
    return weight


def _call_function(batch: TokenBatch, path: str) -> torch.Tensor:
    takes_batch = _takes_batch(path)  # imports its module, too
    arguments = (batch,) if takes_batch else (batch.cross_entropy, batch.entropy)
    module, _, name = path.partition(":")
    weight = getattr(sys.modules[module], name)(*arguments)
    shape = batch.cross_entropy.shape
    if not isinstance(weight, torch.Tensor) or weight.shape != shape:
        raise ValueError(
            f"weighting {path!r} must return a tensor of shape {list(shape)}, one weight a "
            f"token, got {getattr(weight, 'shape', type(weight).__name__)}"
        )
    return weight.to(batch.cross_entropy.dtype)


def check_weighting(config: InfoEntropyConfig, device: torch.device | str = "cpu") -> None:
    """Call a custom weighting once on four tokens, before there is a model to train with it.

    They are certain and right, in between, certain and wrong, and without an idea.

    Raises:
        ValueError: the function cannot be loaded, or returns something of another
            shape, a weight that is negative or not finite, or, where `config.detach_weight` is off,
            no gradient or one that is not finite.
    """
    if config.objective != "custom":
        return
    attached = not config.detach_weight
    ce, entropy = (
        torch.tensor(values, device=device, requires_grad=attached)
        for values in ([[0.0, 1.0], [9.0, 11.0]], [[0.0, 2.0], [0.1, 11.0]])
    )
    batch = TokenBatch(
        cross_entropy=ce,
        entropy=entropy,
        logsumexp=torch.full_like(ce, 11.0, requires_grad=False),
        is_top=ce.detach() == 0,
        sum_p_squared=None,
        mask=torch.ones_like(ce, requires_grad=False),
        target=torch.zeros_like(ce, dtype=torch.int64, requires_grad=False),
    )
    name, where = config.weighting, f"for ce={ce.tolist()} and entropy={entropy.tolist()}"
    with torch.enable_grad():
        weight = _call_function(batch, name)
    if not (weight.isfinite() & (weight >= 0)).all():
        raise ValueError(
            f"weighting {name!r} must return finite weights >= 0, got {weight.tolist()} {where}; "
            "add a small constant where it divides or takes a logarithm, clamp where it subtracts"
        )
    if not attached:
        return
    if not weight.requires_grad:
        raise ValueError(
            f"detach_weight=False differentiates the weights, but those of {name!r} do not depend "
            "on its arguments by torch operations; use detach_weight=True"
        )
    for gradient in torch.autograd.grad(weight.sum(), [ce, entropy], allow_unused=True):
        if gradient is not None and not gradient.isfinite().all():
            raise ValueError(
                f"weighting {name!r} must have finite gradients, got {gradient.tolist()} {where}; "
                "use detach_weight=True, which needs none, or add a small constant"
            )


def _takes_batch(path: str) -> bool:
    """Return whether the function that "package.module:function" names takes a TokenBatch alone.

    Raises:
        ValueError: there is no such module or function, or it takes other arguments than a
            TokenBatch, or cross entropy and entropy.
    """
    module, _, name = path.partition(":")
    try:
        function = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f"weighting {path!r} cannot be loaded ({error}); it must name a function of an "
            "importable module, package.module:function"
        ) from error
    if not callable(function):
        raise ValueError(f"weighting {path!r} is a {type(function).__name__}, not a function")
    takes_batch = _takes(function, 1)
    if not (takes_batch or _takes(function, 2)):
        raise ValueError(
            f"weighting {path!r} must take one argument, a TokenBatch with the fields "
            "cross_entropy, entropy, target, mask, ..., or two, cross entropy and entropy, got "
            f"{name}{signature(function)}"
        )
    return takes_batch


# A compiled graph burns the answer in: torch.compile can follow neither imports nor signatures.
# torch.compiler.assume_constant_result does just this, and imports the whole compiler for it.
_takes_batch._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _takes(function: Callable[..., Any], count: int) -> bool:
    """Return whether a function can be called with so many arguments by their places."""
    try:
        signature(function).bind(*[None] * count)
    except ValueError:  # one that is written in C tells nothing
        return True
    except TypeError:
        return False
    return True


def token_loss(statistics: TokenStatistics, config: InfoEntropyConfig) -> torch.Tensor:
    """What a token's weight multiplies: its cross entropy, smoothed and regularised if asked for.

        (1 - s) ce + s u + z lse^2 - b H

    with s = config.label_smoothing, z = config.z_loss, b = config.entropy_bonus; u, the uniform
    distribution's cross entropy, must be among the statistics where s > 0.
    """
    loss = statistics.cross_entropy
    if config.label_smoothing:
        assert statistics.uniform_cross_entropy is not None
        loss = torch.lerp(loss, statistics.uniform_cross_entropy, config.label_smoothing)
    if config.z_loss:
        loss = loss + config.z_loss * statistics.logsumexp.square()
    if config.entropy_bonus:
        loss = loss - config.entropy_bonus * statistics.entropy
    return loss
