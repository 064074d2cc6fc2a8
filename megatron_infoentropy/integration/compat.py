"""Everything that depends on the version of Megatron-Core.

The loss bound to a model (`use_infoentropy_loss`) needs one method of `LanguageModule`, which is
the same in 0.17, 0.18 and 0.19. The trainer needs much more, which moves between minors: output
processors and `pretrain`'s configuration container came with 0.18, whose `pretrain` still takes a
model provider; 0.19 builds the model from its configuration.
"""

import re
import sys
import warnings
from importlib.util import find_spec
from inspect import signature
from pathlib import Path
from typing import Any

from megatron_infoentropy.runtime import cpu

DROP_IN = ("0.17", "0.18", "0.19")  # that the bound loss is tested with
TRAINER = ("0.19",)  # that megatron_infoentropy.pretrain is tested with


def minor_of(version: str) -> str:
    """Major and minor number of a version: "0.19" of "0.19.2"."""
    minor = re.match(r"\d+\.\d+", version)
    return minor.group() if minor else version


def check_drop_in(module: type) -> None:
    """Refuse models that the loss cannot be bound to; warns of an untested Megatron-Core."""
    # Where the class is Megatron's, which may be a checkout, its megatron.core is imported already.
    version = getattr(sys.modules.get("megatron.core"), "__version__", None)
    where = f"megatron-core {version} (tested: {', '.join(DROP_IN)})"
    method: Any = module.compute_language_model_loss  # type: ignore[attr-defined]
    parameters = [name for name in signature(method).parameters if name != "self"]
    if parameters != ["labels", "logits"]:
        raise ValueError(
            f"{module.__name__}.compute_language_model_loss of {where} takes "
            f"({', '.join(parameters)}), expected (labels, logits): use a tested version"
        )
    if version is not None and minor_of(version) not in DROP_IN:
        warnings.warn(
            f"the InfoEntropy loss is bound to {module.__name__} of {where}: its interface is as "
            "expected; check once that gamma=0 gives the model's own loss",
            stacklevel=3,
        )


def check_trainer() -> None:
    """Refuse a Megatron-Core that `megatron_infoentropy.pretrain` cannot drive."""
    from megatron.core import __version__ as version

    if minor_of(version) not in TRAINER:
        raise ValueError(
            f"megatron_infoentropy.pretrain drives megatron-core {', '.join(TRAINER)}, got "
            f"{version}, whose trainer has another interface: install megatron-core=="
            f"{TRAINER[-1]}.*, or keep your trainer and bind the loss to its model "
            "(megatron_infoentropy.integration.use_infoentropy_loss)"
        )


def prepare_megatron() -> None:
    """Call once per process, before `megatron.training.pretrain`."""
    check_trainer()
    _use_shipped_dataset_helpers()
    if cpu.is_installed():
        _fork_checkpoint_writers()


def takes_output_processor(model: Any) -> bool:
    """Return whether a language model hands its hidden states to an output processor.

    GPTModel does since 0.18. HybridModel of 0.19 does not: there the loss takes the place of
    `compute_language_model_loss`.
    """
    return "output_processor" in signature(model.forward).parameters


# What a GPT has by layers, and a hybrid of the same layers would have elsewhere or not at all.
_BY_LAYERS = (
    *("num_experts", "mtp_num_layers", "no_rope_freq", "window_attn_skip_freq"),
    *("linear_attention_freq", "multi_latent_attention", "cpu_offloading_num_layers"),
    *("pipeline_model_parallel_layout", "decoder_first_pipeline_num_layers"),
    *("decoder_last_pipeline_num_layers", "account_for_embedding_in_pipeline_split"),
    "account_for_loss_in_pipeline_split",
)
# What counts layers, of which the hybrid has two for one.
_COUNTS = (
    *("num_layers", "encoder_num_layers", "recompute_num_layers"),
    *("num_layers_at_start_in_bf16", "num_layers_at_end_in_bf16"),
)


def make_hybrid(args: Any) -> None:
    """Turn validated arguments of a GPT into those of a HybridModel that computes the same.

    Every layer becomes one of attention and one MLP, on the pipeline stage where it was.
    """
    if args.hybrid_layer_pattern is not None:
        if args.use_checkpoint_args:
            return  # the checkpoint is a hybrid's
        raise ValueError(
            "--infoentropy-hybrid makes a --hybrid-layer-pattern of --num-layers, and got one: "
            "leave one of them out"
        )
    if others := [name for name in _BY_LAYERS if getattr(args, name, None)]:
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in others)
        raise ValueError(
            f"--infoentropy-hybrid cannot go with {flags}: it is for dense layers that are alike, "
            "spread evenly; write the pattern out with --hybrid-layer-pattern"
        )
    chunks = args.pipeline_model_parallel_size * (args.virtual_pipeline_model_parallel_size or 1)
    args.hybrid_layer_pattern = "|".join(["*-" * (args.num_layers // chunks)] * chunks)
    args.num_layers_per_virtual_pipeline_stage = args.num_virtual_stages_per_pipeline_rank = None
    for name in _COUNTS:
        if getattr(args, name, None) is not None:
            setattr(args, name, 2 * getattr(args, name))


def model_config_from_args(args: Any) -> Any:
    """Return Megatron's configuration of the model that these parsed arguments describe.

    It is a HybridModel's where they have a --hybrid-layer-pattern, else a GPT's.

    Megatron-Core 0.19.2 hands on whether rotary positions are stretched and forgets by how much:
    its GPT then always has a factor of 8. The arguments, which checkpoints keep, get one more by
    which the conversion knows that this one has the factor that was asked for.
    """
    from megatron.training.argument_utils import gpt_config_from_args, hybrid_config_from_args

    if getattr(args, "hybrid_layer_pattern", None) is not None:
        config = hybrid_config_from_args(args)
        if config.transformer_impl == "local" and config.hybrid_stack_spec is None:
            from megatron_infoentropy.integration.hybrid import local_stack_spec

            config.hybrid_stack_spec = local_stack_spec(config.transformer)
        return config
    config = gpt_config_from_args(args)
    config.rope_scaling_factor = args.rope_scaling_factor
    args.infoentropy_rope_scaling_factor = config.rope_scaling_factor
    return config


def _use_shipped_dataset_helpers() -> None:
    """Skip `make` where there is nothing to make.

    The 0.19 wheel ships the compiled dataset helpers but not their Makefile; Megatron runs make all
    the same and ends the process when it fails. A source checkout, which has one, is left alone.
    """
    from megatron.core.datasets import utils

    has_makefile = (Path(utils.__file__).parent / "Makefile").exists()
    if not has_makefile and find_spec("megatron.core.datasets.helpers_cpp") is not None:
        utils.compile_helpers = lambda: None


def _fork_checkpoint_writers() -> None:
    """Fork the processes that write checkpoints; by default each imports torch again.

    Forking is unsafe once a process has a CUDA context, which on a CPU it never has.
    """
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    filesystem_async.get_write_results_queue("fork")
