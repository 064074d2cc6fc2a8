"""A command line as Megatron itself understands it, for more ranks than there are.

`python -m megatron_infoentropy.launch.parsed FLAGS` is one process that says it is rank 0 of
WORLD_SIZE. It goes through all that a training checks before it builds anything, then prints the
arguments as JSON. --fake-process-group, which it adds, lets no rank wait for another. A module of
its own, since it imports Megatron.
"""

import argparse
import json
import sys
from contextlib import redirect_stdout
from importlib.util import find_spec
from types import ModuleType
from typing import Any
from unittest import mock

from megatron_infoentropy import pretrain
from megatron_infoentropy.runtime import cpu

# What the arithmetic of `launch.dry_run` says nothing of, by the name Megatron's parser gives it.
UNCOUNTED = {
    "num_experts": "experts",
    "multi_latent_attention": "latent attention",
    "mtp_num_layers": "multi-token prediction",
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
    """Print the arguments that the command line amounts to; the rest goes to stderr."""
    with redirect_stdout(sys.stderr):
        cpu.install()  # before megatron is imported

        from megatron.training import get_args

        if find_spec("transformer_engine") is None:
            _accept_precision_aware_optimizer()
        sys.argv += ["--fake-process-group", *LEAVE_NOTHING_BEHIND]
        pretrain.prepare()
        arguments = plain_arguments(get_args())
    json.dump(arguments, sys.stdout)


def _accept_precision_aware_optimizer() -> None:
    """Have its flags checked without Transformer Engine, which only a machine that trains needs.

    Elsewhere Megatron goes by what can be imported, so its stand-in is there for the check alone.
    """
    from megatron.core.optimizer import OptimizerConfig

    def fused_adam(
        master_weight_dtype: Any, exp_avg_dtype: Any, exp_avg_sq_dtype: Any, use_decoupled_grad: Any
    ) -> None: ...

    names = ("transformer_engine", "transformer_engine.pytorch")
    modules = {name: ModuleType(name) for name in (*names, f"{names[1]}.optimizers")}
    modules[f"{names[1]}.optimizers"].FusedAdam = fused_adam  # type: ignore[attr-defined]
    check = OptimizerConfig.__post_init__

    def check_with_optimizer(config: OptimizerConfig) -> None:
        with mock.patch.dict(sys.modules, modules):
            check(config)

    OptimizerConfig.__post_init__ = check_with_optimizer


def plain_arguments(args: argparse.Namespace) -> dict[str, Any]:
    """Return Megatron's validated arguments that JSON holds, and what a parameter and a block take.

    Raises:
        ValueError: a kind of model, pipeline or optimizer that the dry run does not cover.
    """
    require_counted(args)
    plain = {n: v for n, v in vars(args).items() if isinstance(v, bool | int | float | str | None)}
    weight_bytes = args.params_dtype.itemsize
    grouped = args.num_query_groups if args.group_query_attention else args.num_attention_heads
    return plain | {
        "num_query_groups": grouped,
        "train_iters": args.train_iters or args.train_samples // args.global_batch_size,
        "weight_bytes": weight_bytes,  # of one parameter in the forward pass
        "gradient_bytes": 4 if args.accumulate_allreduce_grads_in_fp32 else weight_bytes,
        "optimizer_bytes": optimizer_bytes(args),
        "block_activations": _block_activations(args),
    }


def require_counted(args: argparse.Namespace) -> None:
    """Check that the arithmetic of `launch.dry_run` is for what these arguments describe.

    Raises:
        ValueError: names the flag and what cannot be counted.
    """
    for name, what in UNCOUNTED.items():
        if getattr(args, name, None):
            raise ValueError(
                f"--{name.replace('_', '-')}: the dry run cannot count {what}; "
                "its arithmetic is for dense models of equal layers"
            )
    pattern = args.hybrid_layer_pattern or ""
    if others := "".join(sorted(set(pattern) - set("*-|"))):
        raise ValueError(
            f"--hybrid-layer-pattern {pattern}: the dry run counts attention (*) and MLP (-) "
            f"layers, got {others}"
        )
    stages = args.pipeline_model_parallel_size
    if "|" not in pattern and len(pattern) % stages:
        raise ValueError(
            f"--hybrid-layer-pattern {pattern}: {len(pattern)} layers cannot be spread evenly over "
            f"{stages} pipeline stages; say with | where one ends"
        )
    if args.context_parallel_size > 1:
        raise ValueError("--context-parallel-size: the dry run cannot count context parallelism")
    if args.optimizer != "adam":
        raise ValueError(f"--optimizer {args.optimizer}: the dry run knows Adam's states only")


def optimizer_bytes(args: argparse.Namespace) -> int:
    """Return the bytes of one parameter: Adam's two moments and the copy that is updated.

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


def _block_activations(args: argparse.Namespace) -> dict[str, int]:
    """Return the bytes that attention (*) and an MLP (-) keep of one micro-batch.

    Together they are a layer by Megatron's formulas: the one with sequence parallelism where it
    holds, else the other one. The share of attention is that of the table they were made from, of
    Korthikanti et al. 2022.

    Without tensor parallelism both describe the same training, and the first one knows the FFN's
    width. Neither keeps attention scores: they take a fused attention kernel for granted.
    """
    from megatron.training import theoretical_memory_usage as formulas

    tensor = args.tensor_model_parallel_size
    if args.sequence_parallel or tensor == 1:
        formula = formulas.compute_activation_memory
        share = 13 / (18 + 4 * args.ffn_hidden_size / args.hidden_size)
    else:
        formula = formulas.compute_activation_memory_without_sp
        share = (5 + 8 / tensor) / (10 + 24 / tensor)

    def activations(layers: int) -> Any:
        one_stage: dict[str, Any] = {
            "num_layers": layers,
            "pipeline_model_parallel_size": 1,
            "virtual_pipeline_model_parallel_size": None,
        }
        return formula(argparse.Namespace(**{**vars(args), **one_stage}), num_microbatches=1)

    layer = int(activations(2) - activations(1))
    attention = round(share * layer)
    return {"*": attention, "-": layer - attention}


if __name__ == "__main__":
    main()
