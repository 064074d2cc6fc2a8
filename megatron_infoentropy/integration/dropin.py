"""The bound loss: inside a model that someone else's trainer builds and drives.

`compute_language_model_loss` is bound on the model, as Megatron does itself where it wants another
loss (training/distillation/logits_saver.py). The trainer keeps its own loss function, which sums
`loss_mask * loss`. Where it hands the mask to the model's forward, as Megatron-LM's pretrain_gpt.py
does, alpha is over the unmasked tokens; elsewhere over those whose label is not `ignore_index`.

Two hooks around the model's forward see to that, and to this: a forward that was given labels and
did not call the bound loss is an error, whatever took its place.

In megatron-core 0.17 to 0.19 GPTModel, HybridModel (0.17: MambaModel), T5Model and BertModel all
end in `self.compute_language_model_loss(labels [b, s], logits [s, b, V/TP]) -> [b, s]`.
"""

import logging
from dataclasses import dataclass, field
from functools import partial
from inspect import signature
from typing import Any

import torch
import torch.distributed as dist
from torch.utils.hooks import RemovableHandle

from megatron_infoentropy.config import InfoEntropyConfig
from megatron_infoentropy.integration.compat import check_drop_in
from megatron_infoentropy.integration.output import Groups, check_sharding, weigh_tokens
from megatron_infoentropy.loss.collective import Group, world_and_rank
from megatron_infoentropy.loss.layout import as_ids
from megatron_infoentropy.loss.objective import configured_statistics

logger = logging.getLogger(__name__)

ATTRIBUTE = "infoentropy_loss"  # of the model: the BoundLoss
# Fusions of Megatron's loss that replace the method's body, and with it give way to ours. Others
# (a fused output layer and loss) would never call it.
FUSIONS_OF_THE_METHOD = ("native", "te")


def find_language_module(model: Any) -> Any:
    """Return the module that computes the loss, through wrappers' `.module`."""
    module = model
    # Asked of the class: some wrappers pass attributes through, and would be bound in vain.
    while not _is_language_module(module) and hasattr(module, "module"):
        module = module.module
    if _is_language_module(module):
        return module
    inner = getattr(module, "language_model", None)
    hint = "; bind its .language_model" if _is_language_module(inner) else ""
    raise ValueError(
        f"expected a Megatron LanguageModule (GPTModel, ...), got {type(module).__name__} without "
        f"compute_language_model_loss{hint}"
    )


def _is_language_module(module: Any) -> bool:
    return hasattr(type(module), "compute_language_model_loss")


def check_language_module(module: Any) -> None:
    """Refuse, when the loss is bound, what would give another loss than the one asked for."""
    name, config = type(module).__name__, module.config
    if getattr(config, "mtp_num_layers", None):
        raise ValueError(
            f"{name} has multi-token-prediction heads, which would be handed this loss too while "
            "their scaling assumes an unweighted one; train it with megatron_infoentropy.pretrain, "
            "whose heads keep Megatron's cross entropy or take this loss by --infoentropy-mtp-loss"
        )
    fusion = getattr(config, "cross_entropy_fusion_impl", "native")
    if getattr(config, "cross_entropy_loss_fusion", False) and fusion not in FUSIONS_OF_THE_METHOD:
        raise ValueError(
            f"cross_entropy_loss_fusion with cross_entropy_fusion_impl={fusion!r} would compute "
            f"{name}'s loss in its output layer, past the InfoEntropy loss; leave it out"
        )
    if getattr(module, "fp16_lm_cross_entropy", False):
        raise ValueError(
            f"{name} was built with fp16_lm_cross_entropy=True, and the InfoEntropy statistics are "
            "fp32 from 16-bit logits at no extra memory; leave it out"
        )
    if not getattr(module, "parallel_output", True):
        _require_one_rank(module, f"{name} was built with parallel_output=False: it gathers logits")
    if getattr(module, "post_process", True) and shard_columns(module) is None:
        _require_one_rank(
            module, f"{name} states neither its output layer's share of the vocabulary nor a size"
        )


def _require_one_rank(module: Any, what: str) -> None:
    ranks, _ = world_and_rank(tensor_group(module))
    if ranks > 1:
        raise ValueError(
            f"{what}, while the InfoEntropy loss takes logits whose vocabulary is sharded over "
            f"the {ranks} tensor-parallel ranks; build it with a ColumnParallelLinear output layer "
            "and parallel_output=True"
        )


def tensor_group(module: Any) -> Any:
    """The process group over which the module's logits are sharded; None is this rank alone."""
    return module.pg_collection.tp


def shard_columns(module: Any) -> int | None:
    """Columns of this rank's logits, padding included; None where the module does not say."""
    columns = getattr(getattr(module, "output_layer", None), "output_size_per_partition", None)
    size = getattr(module, "vocab_size", None)
    if columns is None and size is not None:  # an adapter may lie around the output layer
        ranks, _ = world_and_rank(tensor_group(module))
        columns = size // ranks
    return columns


def use_infoentropy_loss(
    model: Any,
    config: InfoEntropyConfig | None = None,
    *,
    vocab_size: int | None = None,
    ignore_index: int = -100,
    data_parallel_group: Group | None = None,
    inplace_backward: bool = False,
) -> Any:
    """Bind the InfoEntropy loss to a Megatron `LanguageModule`; returns the model.

    In training the per-token losses become alpha w l; in evaluation they are plain cross entropy,
    so that perplexities stay comparable. Binding again replaces what was bound.

    Args:
        model: a module with `compute_language_model_loss(labels, logits)`, before or after it is
            wrapped (its `.module`s are followed), or a list of them: pipeline chunks, or what a
            pre-wrap hook is handed. Stages without an output layer never call what is bound.
        config: None is the published setting. alpha is a constant in the backward pass. "global"
            here means over one micro-batch, since its sum is all that the model sees.
        vocab_size: true vocabulary size, to keep the table's padding out of the softmax.
        ignore_index: label of tokens that take no part; their loss is 0.
        data_parallel_group: ranks whose weights alpha is taken over; None uses this rank's alone.
        inplace_backward: write the gradient over the logits, which halves their memory; only where
            nothing else (a hook, a distillation loss) reads them after the loss.

    Raises:
        ValueError: the model has no such method, or it or a setting cannot be used here.
    """
    config = InfoEntropyConfig() if config is None else config
    config.require_no_trainer()
    if config.fused_linear:
        raise ValueError(
            "fused_linear needs the hidden states, and a bound loss is handed logits: leave it "
            "out, or train with megatron_infoentropy.pretrain"
        )
    modules = [find_language_module(m) for m in (model if isinstance(model, list) else [model])]
    for module in modules:
        check_drop_in(type(module))
        check_language_module(module)
    for module in modules:
        BoundLoss(config, vocab_size, ignore_index, data_parallel_group, inplace_backward).bind(
            module
        )
        if not dist.is_initialized() or dist.get_rank() == 0:
            logger.info("InfoEntropy loss bound to %s: %s", type(module).__name__, config)
    return model


def bound_loss(model: Any) -> "BoundLoss":
    """Return what is bound to a model, and how often it has run: the proof that it does.

    Raises:
        ValueError: no InfoEntropy loss is bound, or it was bound over.
    """
    module = find_language_module(model)
    bound = getattr(module, ATTRIBUTE, None)
    if not isinstance(bound, BoundLoss):
        raise ValueError(f"no InfoEntropy loss is bound to {type(module).__name__}")
    if not bound.is_in_place(module):
        raise ValueError(
            f"the InfoEntropy loss bound to {type(module).__name__} was replaced: its "
            f"compute_language_model_loss is {module.compute_language_model_loss}"
        )
    return bound


@dataclass(eq=False)
class BoundLoss:
    """The loss of one model; `training_calls` and `evaluation_calls` count micro-batches.

    samples: consumed before this step, for weightings that ask (`TokenBatch`); set it yourself.
    """

    config: InfoEntropyConfig
    vocab_size: int | None
    ignore_index: int
    data_parallel_group: Group | None
    inplace_backward: bool
    training_calls: int = 0
    evaluation_calls: int = 0
    samples: int = 0
    _parameters: list[str] = field(default_factory=list, init=False, repr=False)
    _loss_mask: torch.Tensor | None = field(default=None, init=False, repr=False)
    _has_run: bool = field(default=False, init=False, repr=False)
    _hooks: tuple[RemovableHandle, ...] = field(default=(), init=False, repr=False)

    def bind(self, module: Any) -> None:
        """Put it in place of the module's own loss, with the hooks that watch over it."""
        previous = getattr(module, ATTRIBUTE, None)
        if isinstance(previous, BoundLoss):
            for hook in previous._hooks:
                hook.remove()
        self._parameters = list(signature(module.forward).parameters)
        self._hooks = (
            module.register_forward_pre_hook(self._before_forward, with_kwargs=True),
            module.register_forward_hook(self._after_forward, with_kwargs=True),
        )
        # Not a bound method: a copy of the model would go on calling this object.
        module.compute_language_model_loss = partial(self, module)
        setattr(module, ATTRIBUTE, self)

    def is_in_place(self, module: Any) -> bool:
        """Return whether the module would still call it."""
        method = module.compute_language_model_loss
        return getattr(method, "func", None) is self

    def __call__(self, module: Any, labels: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """labels [batch, sequence], logits [sequence, batch, V/TP] -> [batch, sequence]."""
        group = tensor_group(module)
        check_sharding(logits.shape[-1], shard_columns(module), group)
        self._has_run = True
        labels, mask = as_ids(labels), None
        if module.training and self._loss_mask is not None:
            mask = self._loss_mask.reshape(labels.shape)
            labels = labels.masked_fill(mask == 0, self.ignore_index)
        target = labels.transpose(0, 1)
        statistics = configured_statistics(
            logits,
            target,
            self.config,
            group=group,
            vocab_size=self.vocab_size,
            ignore_index=self.ignore_index,
            inplace_backward=self.inplace_backward and logits.requires_grad and not logits.is_leaf,
        )
        if module.training:
            self.training_calls += 1
            valid = target != self.ignore_index
            tokens = weigh_tokens(
                statistics,
                # By the mask the trainer multiplies the loss, so alpha is over it.
                valid if mask is None else valid * mask.transpose(0, 1),
                self.config,
                Groups(None, self.data_parallel_group),
                target=target,
                samples=self.samples,
                normalizations=("paper", "global"),
            )
            loss = tokens.alpha * tokens.weight * tokens.loss
        else:
            self.evaluation_calls += 1
            loss = statistics.cross_entropy
        return loss.transpose(0, 1).contiguous()

    def _before_forward(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._loss_mask = self._argument("loss_mask", args, kwargs)
        self._has_run = False

    def _after_forward(
        self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        """Raises RuntimeError where labels were given and something else made a loss of them."""
        self._loss_mask = None
        labels = [self._argument(name, args, kwargs) for name in ("labels", "lm_labels")]
        expected = getattr(module, "post_process", True) and any(x is not None for x in labels)
        if self._has_run or not expected:
            return
        name = type(module).__name__
        if self._argument("output_processor", args, kwargs) is not None:
            cause = f"{name}.forward was called with an output_processor, which took its place"
        elif not self.is_in_place(module):
            cause = "its compute_language_model_loss was bound to something else afterwards"
        else:
            cause = f"{name}.forward computes its loss without compute_language_model_loss"
        raise RuntimeError(f"the InfoEntropy loss bound to {name} was not used: {cause}")

    def _argument(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """An argument of the module's forward, None where it was not given."""
        if name in kwargs:
            return kwargs[name]
        index = self._parameters.index(name) if name in self._parameters else len(args)
        return args[index] if index < len(args) else None
