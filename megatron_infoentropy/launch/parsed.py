"""A command line as Megatron itself understands it, for more ranks than there are.

`python -m megatron_infoentropy.launch.parsed FLAGS` is one process that says it is rank 0 of
WORLD_SIZE. It goes through all that a training checks before it builds anything, then prints a
`Shape` as JSON. --fake-process-group, which it adds, lets no rank wait for another.
"""

import argparse
import json
import sys
from contextlib import redirect_stdout
from dataclasses import asdict
from importlib.util import find_spec
from types import ModuleType
from typing import Any

from megatron_infoentropy import pretrain
from megatron_infoentropy.launch.estimate import Shape
from megatron_infoentropy.runtime import cpu

# What the arithmetic of `launch.estimate` says nothing of, by the name Megatron's parser gives it.
UNCOUNTED = {
    "num_experts": "experts",
    "multi_latent_attention": "latent attention",
    "mtp_num_layers": "multi-token prediction",
    "hybrid_layer_pattern": "layers of several kinds",
    "heterogeneous_layers_config_path": "layers of several kinds",
    "pipeline_model_parallel_layout": "an uneven pipeline",
    "decoder_first_pipeline_num_layers": "an uneven pipeline",
    "decoder_last_pipeline_num_layers": "an uneven pipeline",
    "account_for_embedding_in_pipeline_split": "an uneven pipeline",
    "account_for_loss_in_pipeline_split": "an uneven pipeline",
    "optimizer_cpu_offload": "an optimizer on the CPU",
    "use_megatron_fsdp": "sharded parameters",
    "use_torch_fsdp2": "sharded parameters",
    "fp8_param_gather": "parameters in FP8",
}

# The last of the ranks opens these writers, and the only rank of a world of one is the last.
LEAVE_NOTHING_BEHIND = ("--tensorboard-dir=", "--wandb-project=")


def main() -> None:
    """Print the shape of the training that the command line describes; the rest goes to stderr."""
    with redirect_stdout(sys.stderr):
        cpu.install()  # before megatron is imported

        from megatron.training import get_args

        if find_spec("transformer_engine") is None:
            _accept_precision_aware_optimizer()
        sys.argv += ["--fake-process-group", *LEAVE_NOTHING_BEHIND]
        pretrain.prepare()
        shape = shape_of(get_args())
    json.dump(asdict(shape), sys.stdout)


def _accept_precision_aware_optimizer() -> None:
    """Have its flags checked without Transformer Engine, which only a machine that trains needs."""
    from megatron.core.optimizer import OptimizerConfig

    package = "transformer_engine"
    modules = {name: ModuleType(name) for name in (package, f"{package}.pytorch")}
    optimizers = ModuleType(f"{package}.pytorch.optimizers")
    optimizers.FusedAdam = _FusedAdam  # type: ignore[attr-defined]
    modules[optimizers.__name__] = optimizers
    check = OptimizerConfig.__post_init__

    def check_with_optimizer(config: OptimizerConfig) -> None:
        sys.modules.update(modules)
        try:
            check(config)
        finally:  # elsewhere Megatron goes by what can be imported
            for name in modules:
                del sys.modules[name]

    OptimizerConfig.__post_init__ = check_with_optimizer


class _FusedAdam:
    """Has the arguments that Megatron looks for."""

    def __init__(
        self,
        master_weight_dtype: Any,
        exp_avg_dtype: Any,
        exp_avg_sq_dtype: Any,
        use_decoupled_grad: Any,
    ) -> None: ...


def shape_of(args: argparse.Namespace) -> Shape:
    """What the estimates need of Megatron's validated arguments.

    Raises:
        ValueError: a kind of model, pipeline or optimizer that they do not cover.
    """
    _require_counted(args)
    model_ranks = args.tensor_model_parallel_size * args.pipeline_model_parallel_size
    return Shape(
        num_layers=args.num_layers,
        hidden_size=args.hidden_size,
        ffn_hidden_size=args.ffn_hidden_size,
        num_attention_heads=args.num_attention_heads,
        num_query_groups=(
            args.num_query_groups if args.group_query_attention else args.num_attention_heads
        ),
        kv_channels=args.kv_channels,
        gated=args.swiglu,
        linear_bias=args.add_bias_linear,
        qkv_bias=args.add_qkv_bias,
        norm_vectors=1 if args.normalization == "RMSNorm" else 2,
        qk_layernorm=bool(args.qk_layernorm),
        position_table=(
            args.max_position_embeddings
            if args.position_embedding_type == "learned_absolute"
            else 0
        ),
        untied=args.untie_embeddings_and_output_weights,
        vocab_size=args.padded_vocab_size,
        tensor_parallel=args.tensor_model_parallel_size,
        pipeline_parallel=args.pipeline_model_parallel_size,
        virtual_stages=args.virtual_pipeline_model_parallel_size or 1,
        data_parallel=args.world_size // model_ranks,
        sequence_parallel=args.sequence_parallel,
        micro_batch_size=args.micro_batch_size,
        global_batch_size=args.global_batch_size,
        seq_length=args.seq_length,
        train_iters=args.train_iters or args.train_samples // args.global_batch_size,
        weight_bytes=args.params_dtype.itemsize,
        gradient_bytes=4 if args.accumulate_allreduce_grads_in_fp32 else args.params_dtype.itemsize,
        optimizer_bytes=optimizer_bytes(args),
        distributed_optimizer=args.use_distributed_optimizer,
        fp8=args.fp8 is not None,
        fused_linear=args.infoentropy_fused_linear,
        chunk_tokens=args.infoentropy_chunk_tokens,
        layer_activations=_layer_activations(args),
        recompute=args.recompute_method or "" if args.recompute_granularity == "full" else "",
        recompute_layers=args.recompute_num_layers or 1,
    )


def _require_counted(args: argparse.Namespace) -> None:
    for name, what in UNCOUNTED.items():
        if getattr(args, name, None):
            raise ValueError(
                f"--{name.replace('_', '-')}: the dry run cannot count {what}; "
                "its arithmetic is for dense models of equal layers"
            )
    if args.context_parallel_size > 1:
        raise ValueError("--context-parallel-size: the dry run cannot count context parallelism")
    if args.optimizer != "adam":
        raise ValueError(f"--optimizer {args.optimizer}: the dry run knows Adam's states only")


def optimizer_bytes(args: argparse.Namespace) -> int:
    """Of one parameter: Adam's two moments and the copy that is updated.

    A precision-aware optimizer chooses their types. An fp32 copy that Transformer Engine keeps, not
    Megatron, is stored as the 16 bits that the parameter lacks.
    """
    is_16_bit = args.params_dtype.itemsize == 2
    if not args.use_precision_aware_optimizer:
        return 12 if is_16_bit else 8
    moments: int = args.exp_avg_dtype.itemsize + args.exp_avg_sq_dtype.itemsize
    if not is_16_bit:
        return moments
    is_megatrons = args.fp8_recipe not in (None, "delayed") and args.main_params_dtype.itemsize == 4
    return moments + (4 if is_megatrons else 2)


def _layer_activations(args: argparse.Namespace) -> int:
    """By Megatron's formula with sequence parallelism where it holds, else by its other one.

    Without tensor parallelism both describe the same training, and the first one knows the FFN's
    width. Neither keeps attention scores: they take a fused attention kernel for granted.
    """
    from megatron.training import theoretical_memory_usage as formulas

    if args.sequence_parallel or args.tensor_model_parallel_size == 1:
        formula = formulas.compute_activation_memory
    else:
        formula = formulas.compute_activation_memory_without_sp

    def activations(layers: int) -> Any:
        one_stage: dict[str, Any] = {
            "num_layers": layers,
            "pipeline_model_parallel_size": 1,
            "virtual_pipeline_model_parallel_size": None,
        }
        return formula(argparse.Namespace(**{**vars(args), **one_stage}), num_microbatches=1)

    return int(activations(2) - activations(1))


if __name__ == "__main__":
    main()
