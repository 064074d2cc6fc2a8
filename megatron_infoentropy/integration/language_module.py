"""What the bound loss asks of a Megatron `LanguageModule`, and which models cannot give it.

In megatron-core 0.17 to 0.19 GPTModel, HybridModel (0.17: MambaModel), T5Model and BertModel all
end in `self.compute_language_model_loss(labels [b, s], logits [s, b, V/TP]) -> [b, s]`.
"""

from typing import Any

from megatron_infoentropy.loss.collective import world_and_rank

# Fusions of Megatron's loss that replace the method's body, and with it give way to ours. Others
# (a fused output layer and loss) would never call it.
FUSIONS_OF_THE_METHOD = ("native", "te")


def find_language_module(model: Any) -> Any:
    """The module that computes the loss, found through wrappers' `.module`.

    Raises:
        ValueError: there is none, with a hint where it may be.
    """
    found = model
    # Asked of the class: some wrappers pass attributes through, and would be bound in vain.
    while not _is_language_module(found) and hasattr(found, "module"):
        found = found.module
    if _is_language_module(found):
        return found
    inner = getattr(found, "language_model", None)
    hint = "; bind its .language_model" if _is_language_module(inner) else ""
    raise ValueError(
        f"expected a Megatron LanguageModule (GPTModel, ...), got {type(found).__name__} without "
        f"compute_language_model_loss{hint}"
    )


def _is_language_module(module: Any) -> bool:
    return hasattr(type(module), "compute_language_model_loss")


def check_language_module(module: Any) -> None:
    """Refuse, when the loss is bound, what would give another loss than the one asked for.

    Raises:
        ValueError: names the setting and says what to do.
    """
    name, config = type(module).__name__, module.config
    if getattr(config, "mtp_num_layers", None):
        raise ValueError(
            f"{name} has multi-token-prediction heads, which would be handed this loss too while "
            "their scaling assumes an unweighted one; train it with megatron_infoentropy.pretrain, "
            "whose heads keep Megatron's cross entropy"
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


def check_shard(module: Any, columns: int) -> None:
    """Gathered logits, taken for a shard, would give a loss that is off by ln(TP) and look fine.

    Raises:
        ValueError: `columns` is not the module's share of the vocabulary.
    """
    expected = shard_columns(module)
    if expected is not None and columns != expected:
        ranks, _ = world_and_rank(tensor_group(module))
        raise ValueError(
            f"expected vocabulary-sharded logits with {expected} columns ({ranks} tensor-parallel "
            f"ranks), got {columns}; build the model with parallel_output=True and call it without "
            "runtime_gather_output"
        )
