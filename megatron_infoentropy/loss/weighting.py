"""A token's loss and its weight, from the statistics of the predicted distribution."""

import importlib
import sys
from collections.abc import Callable

import torch

from megatron_infoentropy.config import InfoEntropyConfig
from megatron_infoentropy.loss.statistics import TokenStatistics

LEAST_WEIGHT = 2.0**-100  # a smaller one is not inverted: times a long sequence it overflows fp32


def token_weight(
    statistics: TokenStatistics, config: InfoEntropyConfig, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """The weight w >= 0 of every token, in the target's shape, before normalisation.

    infoentropy: (sigma + H)^gamma, the published weight with sigma 1 and gamma 1; focal:
    (1 - p(target))^gamma; custom: the configuration's own function; then mixed with 1 by
    config.blend. A constant in the backward pass where `config.detach_weight`.

    mask: in the target's shape, 0 where a token takes no part. The weight is not multiplied by it,
    but finite there, which a custom function need not be for the cross entropy and entropy of 0
    that such tokens have.

    Raises:
        ValueError: a custom function cannot be loaded, returns another shape or, on a CPU, a
            negative weight (on a GPU, where a look would stall the device, that weight is NaN).
    """
    ce, entropy = statistics.cross_entropy, statistics.entropy
    if not config.is_weighted:
        return torch.ones_like(ce, requires_grad=False)
    if config.detach_weight:
        ce, entropy = ce.detach(), entropy.detach()
    if config.objective == "custom":
        weight = _custom_weight(ce, entropy, config, mask)
    else:
        weight = _power(ce, entropy, config)
    return torch.lerp(weight, torch.ones_like(weight), config.blend) if config.blend else weight


def _power(ce: torch.Tensor, entropy: torch.Tensor, config: InfoEntropyConfig) -> torch.Tensor:
    # 1 - e^-ce by expm1, so that it keeps its digits for confident tokens.
    base = entropy + config.sigma if config.objective == "infoentropy" else -torch.expm1(-ce)
    if config.gamma < 1 and not config.detach_weight:
        # The power's slope is infinite at 0; such a token's weight is held constant.
        base = base.clamp_min(LEAST_WEIGHT)
    return base**config.gamma


def _custom_weight(
    ce: torch.Tensor, entropy: torch.Tensor, config: InfoEntropyConfig, mask: torch.Tensor | None
) -> torch.Tensor:
    if mask is None:
        weight = _call_function(ce, entropy, config.weighting)
    else:
        # Chosen on both sides: a gradient through either alone would be 0 * inf at times.
        counts = mask != 0
        ce, entropy = (torch.where(counts, values, 1) for values in (ce, entropy))
        weight = torch.where(counts, _call_function(ce, entropy, config.weighting), 0)
    negative = weight < 0
    if torch.compiler.is_compiling() or weight.device.type != "cpu":
        return weight.masked_fill(negative, torch.nan)
    if negative.any():
        raise ValueError(
            f"weighting {config.weighting!r} gave {int(negative.sum())} negative weight(s), the "
            f"least is {float(weight.min())}; weights must be >= 0: clamp them"
        )
    return weight


def _call_function(ce: torch.Tensor, entropy: torch.Tensor, path: str) -> torch.Tensor:
    weight = _load_function(path)(ce, entropy)
    if not isinstance(weight, torch.Tensor) or weight.shape != ce.shape:
        raise ValueError(
            f"weighting {path!r} must return a tensor of shape {list(ce.shape)}, one weight a "
            f"token, got {getattr(weight, 'shape', type(weight).__name__)}"
        )
    return weight.to(ce.dtype)


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
    name, where = config.weighting, f"for ce={ce.tolist()} and entropy={entropy.tolist()}"
    with torch.enable_grad():
        weight = _call_function(ce, entropy, name)
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


def _load_function(path: str) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """The function that "package.module:function" names.

    Raises:
        ValueError: there is no such module or function.
    """
    module, _, name = path.partition(":")
    try:
        # Looked up first: torch.compile can follow this, but no import.
        loaded = sys.modules.get(module) or importlib.import_module(module)
        function = getattr(loaded, name)
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f"weighting {path!r} cannot be loaded ({error}); it must name a function of an "
            "importable module, package.module:function"
        ) from error
    if not callable(function):
        raise ValueError(f"weighting {path!r} is a {type(function).__name__}, not a function")
    return function  # type: ignore[no-any-return]


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
