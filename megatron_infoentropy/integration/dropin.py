"""Door 2: the loss inside a model that someone else's trainer builds and drives.

The trainer keeps its own loss function, which sums `loss_mask * loss`. The bound method sees labels
and logits but no mask, so alpha is taken over the micro-batch's tokens whose label is not
`ignore_index`; where that matters, mark masked tokens in the labels.
"""

from types import MethodType
from typing import Any

import torch

from megatron_infoentropy.config import InfoEntropyConfig
from megatron_infoentropy.integration.output import check_sharding
from megatron_infoentropy.loss.collective import Group
from megatron_infoentropy.loss.objective import (
    alpha,
    configured_statistics,
    reduce_sums,
    token_sums,
)
from megatron_infoentropy.loss.weighting import token_loss, token_weight


def use_infoentropy_loss(
    model: Any,
    config: InfoEntropyConfig | None = None,
    *,
    vocab_size: int | None = None,
    ignore_index: int = -100,
    data_parallel_group: Group | None = None,
) -> Any:
    """Bind the InfoEntropy loss to a Megatron `LanguageModule`; returns the model.

    In training the per-token losses become alpha w l; in evaluation they are plain cross entropy,
    so that perplexities stay comparable.

    Args:
        model: any module with `compute_language_model_loss(labels, logits)`, before or after it is
            wrapped (its `.module`s are followed). On pipeline stages without an output layer the
            bound method is never called.
        config: None is the published setting. alpha is a constant in the backward pass. "global"
            here means over one micro-batch, since its sum is all that this method sees.
        vocab_size: true vocabulary size, to keep the table's padding out of the softmax.
        ignore_index: label of tokens that take no part; their loss is 0.
        data_parallel_group: ranks whose weights alpha is taken over; None uses this rank's alone.

    Raises:
        ValueError: the model has no such method, or a setting cannot be used here.
    """
    config = InfoEntropyConfig() if config is None else config
    config.require_constant_gamma()
    target = model
    # Asked of the class: some wrappers pass attributes through, and would be bound in vain.
    while not _is_language_model(target) and hasattr(target, "module"):
        target = target.module
    if not _is_language_model(target):
        raise ValueError(
            f"expected a Megatron LanguageModule (GPTModel, ...), got {type(model).__name__} "
            "without compute_language_model_loss"
        )
    if getattr(target.config, "mtp_num_layers", None):
        raise ValueError(
            "the model has multi-token-prediction heads, which would be handed this loss too while "
            "their scaling assumes an unweighted one; train it with megatron_infoentropy.pretrain, "
            "whose heads keep Megatron's cross entropy"
        )

    def compute_language_model_loss(
        self: Any, labels: torch.Tensor, logits: torch.Tensor
    ) -> torch.Tensor:
        """labels [batch, sequence], logits [sequence, batch, V/TP] -> [batch, sequence]."""
        check_sharding(logits, self.output_layer, self.pg_collection.tp)
        target = labels.transpose(0, 1)
        statistics = configured_statistics(
            logits,
            target,
            config,
            group=self.pg_collection.tp,
            vocab_size=vocab_size,
            ignore_index=ignore_index,
        )
        loss = statistics.cross_entropy
        if self.training:
            loss, weight = token_loss(statistics, config), token_weight(statistics, config)
            mask = (target != ignore_index).to(loss.dtype)
            sums = token_sums(loss.detach(), weight.detach(), mask)
            loss = weight * loss
            if config.is_weighted and config.normalization != "none":
                sums_of_group = reduce_sums(sums, data_parallel_group)
                loss = alpha(sums_of_group, config.normalization) * loss
        return loss.transpose(0, 1).contiguous()

    target.compute_language_model_loss = MethodType(compute_language_model_loss, target)
    return model


def _is_language_model(module: Any) -> bool:
    return hasattr(type(module), "compute_language_model_loss")
