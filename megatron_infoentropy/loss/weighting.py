"""The weight of a token, from its cross entropy and the entropy of the predicted distribution."""

import torch

from megatron_infoentropy.config import InfoEntropyConfig


def token_weight(
    ce: torch.Tensor, entropy: torch.Tensor, config: InfoEntropyConfig
) -> torch.Tensor:
    """The weight w >= 0 of every token, in the shape of `ce`, before normalisation.

    infoentropy: (sigma + H)^gamma, the published weight with sigma 1 and gamma 1; focal:
    (1 - p(target))^gamma. A constant in the backward pass where `config.detach_weight`.
    """
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
