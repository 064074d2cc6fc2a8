"""Every statistic and every setting of the objective from its formula, in dense float64."""

import importlib
import math
from types import SimpleNamespace

import torch
from oracle import dense_statistics, meant, uniform_cross_entropy


def dense_results(logits, target, softcap=None, temperature=1.0):
    """(cross entropy, entropy, log-sum-exp, uniform cross entropy, sum p^2), 0 where ignored."""
    z = meant(logits, softcap, torch.as_tensor(temperature, dtype=torch.float64).unsqueeze(-1))
    valid = target != -100
    squares = z.softmax(-1).square().sum(-1)
    return [*dense_statistics(z, target), uniform_cross_entropy(z) * valid, squares * valid]


# As published: the weight of every token from its statistics and the configuration.
WEIGHTS = {
    "cross_entropy": lambda t, c: torch.ones_like(t.entropy),
    "infoentropy": lambda t, c: (c.sigma + t.entropy) ** c.gamma,
    "focal": lambda t, c: (1 - torch.exp(-t.cross_entropy)) ** c.gamma,
    "lin_focal": lambda t, c: (1 - torch.exp(-t.cross_entropy)) ** c.gamma,
    "eaft": lambda t, c: (t.entropy / math.log(20)) ** c.gamma,
    "dft": lambda t, c: torch.exp(-c.gamma * t.cross_entropy),
    "deft": lambda t, c: torch.exp(-t.squares * t.cross_entropy),
    "eslm": lambda t, c: (
        t.entropy >= t.entropy.sort().values[round(len(t.entropy) * c.quantile)]
    ).double(),
    "custom": lambda t, c: named(c.weighting)(t),
}


def named(path):
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(module), name)


def dense_loss(batches, config):
    """The loss of one micro-batch step; `batches` are (logits, target, mask), one a data rank.

    Of tokens that take part alone, so that others cannot matter.
    """
    sums = []
    for logits, target, mask in batches:
        kept = (mask * (target != -100)) != 0
        m = mask[kept].double()
        results = dense_results(
            logits[kept], target[kept], config.softcap or None, config.temperature
        )
        ce, entropy, lse, uniform, squares = results
        tokens = SimpleNamespace(cross_entropy=ce, entropy=entropy, squares=squares, mask=m)
        w = WEIGHTS[config.objective](tokens, config)
        w = w.detach() if config.detach_weight else w
        w = (1 - config.blend) * w + config.blend
        smoothed = (1 - config.label_smoothing) * ce + config.label_smoothing * uniform
        loss = smoothed + config.z_loss * lse**2 - config.entropy_bonus * entropy
        sums.append(((m * w * loss).sum(), (m * w).sum(), m.sum()))
    weighted, weights, counts = (sum(parts) for parts in zip(*sums, strict=True))
    if config.normalization == "global":
        return weighted / weights
    inverse = [count / weight for _, weight, count in sums if weight.detach() != 0]
    alpha = sum(inverse) / len(inverse) if config.normalization == "paper" else 1
    return weighted / counts * alpha
