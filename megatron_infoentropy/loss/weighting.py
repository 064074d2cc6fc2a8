"""A token's loss and its weight, from the statistics of the predicted distribution."""

import torch

from megatron_infoentropy.config import InfoEntropyConfig
from megatron_infoentropy.loss.statistics import TokenStatistics


def token_weight(statistics: TokenStatistics, config: InfoEntropyConfig) -> torch.Tensor:
    """The weight w >= 0 of every token, in the target's shape, before normalisation.

    infoentropy: (sigma + H)^gamma, the published weight with sigma 1 and gamma 1; focal:
    (1 - p(target))^gamma. A constant in the backward pass where `config.detach_weight`.
    """
    ce, entropy = statistics.cross_entropy, statistics.entropy
    if not config.is_weighted:
        return torch.ones_like(ce, requires_grad=False)
    if config.detach_weight:
        ce, entropy = ce.detach(), entropy.detach()
    # 1 - e^-ce by expm1, so that it keeps its digits for confident tokens.
    base = entropy + config.sigma if config.objective == "infoentropy" else -torch.expm1(-ce)
    if config.gamma < 1 and not config.detach_weight:
        # The power's slope is infinite at 0; such a token's weight is then held constant.
        base = base.clamp_min(torch.finfo(base.dtype).tiny)
    return base**config.gamma


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
