"""The `--infoentropy-*` flags, generated from InfoEntropyConfig, and what they cannot go with.

Megatron saves all arguments in every checkpoint, ours among them: a run can tell whether it goes on
with the same.
"""

import argparse
import copy
import dataclasses
import math
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any, Literal, get_args, get_origin

from megatron_infoentropy.config import MEANS, NO_EXPORT, InfoEntropyConfig
from megatron_infoentropy.integration.checkpoints import add_checkpoint_flags
from megatron_infoentropy.loss.weighting import check_weighting
from megatron_infoentropy.runtime.device import find_device

PREFIX = "infoentropy"

BIND = (
    "use Megatron's own script and bind the loss to its model "
    "(megatron_infoentropy.integration.use_infoentropy_loss)"
)
# Flags of Megatron that our trainer does not obey, and what to do instead.
UNSERVED = {
    "trust_remote_code": "it runs code that came with a tokenizer; use a tokenizer that needs none "
    "(tokenizer.json)",
    "fp16_lm_cross_entropy": "the InfoEntropy statistics are fp32 from 16-bit logits at no extra "
    "memory; leave the flag out",
    "sft": "its datasets need packed attention, and its tokenizer masks no prompt of another chat "
    "template than Nemotron's; use --infoentropy-conversations",
    **dict.fromkeys(
        ("fim_data", "dataloader_inter_document_masking", "hybrid_context_parallel"),
        f"this trainer reads plain packed text and would ignore the flag; {BIND}",
    ),
    "logits_load_dir": "this trainer has no loss against a teacher and would ignore the flag; use "
    "Megatron's own script",
    "logits_save_dir": "this trainer would go on training the model whose logits are saved; use "
    "Megatron's own script",
    "perform_rl_step": "this trainer has no loss of a policy; use Megatron's own script",
    "inprocess_restart": "this trainer would ignore the flag; restarts are torchrun's, with "
    "--max-restarts",
}

# What cannot go with conversations, one a sequence, from .jsonl files.
CONVERSATIONS = dict.fromkeys(
    (
        *("mock_data", "infoentropy_whole_pieces", "reset_position_ids", "reset_attention_mask"),
        "eod_mask_loss",
    ),
    "a sequence is one conversation of a .jsonl file; leave one of them out",
)

# What a HybridModel, of --hybrid-layer-pattern, cannot be trained with here.
UNHYBRID = {
    "use_rope_scaling": "Megatron's HybridModel ignores the flag; leave it out",
    "rotary_interleaved": "Megatron's HybridModel turns the two numbers of a pair by different "
    "angles then; leave it out",
    "heterogeneous_layers_config_path": "Megatron's HybridModel ignores the flag; leave it out",
    "overlap_moe_expert_parallel_comm": "Megatron's HybridModel has no schedule plan; leave it out",
}
# What keeps --mtp-loss weighted from the prediction heads.
UNWEIGHTED = {
    "overlap_moe_expert_parallel_comm": "it computes the heads' loss when the forward step has "
    "ended; leave one of them out"
}
LOCAL_LAYERS = "*-"  # attention and MLP, that Megatron-Core has without Transformer Engine
BOUNDARIES = "|/"  # in a pattern: of pipeline stages, and before the layers of a prediction head

# What Megatron's output layer does beside its matrix product, or with its weight before it.
UNFUSED = {
    "use_mup": "it scales the logits; leave one of them out",
    "defer_embedding_wgrad_compute": "it keeps the gradients of all logits; leave one of them out",
    "fp8_output_proj": "it multiplies in FP8; leave one of them out",
    **dict.fromkeys(
        ("use_megatron_fsdp", "use_torch_fsdp2"),
        "it gathers the weight when the output layer is called; leave one of them out",
    ),
}

# What cannot go with "global", where all gradients are divided once by the weight of the batch.
UNSCALED = {
    "use_torch_fsdp2": "it has no way to scale gradients once by 1/sum(w) of the global batch; use "
    "'paper' or 'none', or --use-megatron-fsdp",
    "ddp_average_in_collective": "gradients are summed over ranks and divided once by sum(w) of "
    "the global batch; leave one of them out",
    **dict.fromkeys(
        ("num_experts", "mtp_num_layers", "dsa_indexer_loss_coeff"),
        "every gradient is scaled once by 1/sum(w) of the global batch, those of its own losses "
        "too; use 'paper' or 'none'",
    ),
}


# Of `megatron_infoentropy.pretrain` alone, each on where it is given.
SWITCHES = {
    f"{PREFIX}-whole-pieces": "a sequence is one piece of `infoentropy pack --length SEQ_LENGTH`: "
    "its last token has no target, and nothing of another piece is seen",
    f"{PREFIX}-conversations": "data paths are .jsonl files, "
    '{"messages": [{"role": ..., "content": ...}, ...]} a line; a sequence is one of them in the '
    "tokenizer's chat template, and only what the assistant says has targets",
    f"{PREFIX}-unscaled-init": "draw every matrix from N(0, init-method-std), also the two that "
    "end a layer's blocks, whose deviation Megatron divides by sqrt(2 layers)",
    NO_EXPORT: "train a model that cannot be exported to Hugging Face, hence not be evaluated: one "
    "with a softcap or a temperature, which is refused otherwise",
    f"{PREFIX}-hybrid": "build the GPT that the flags describe as Megatron's HybridModel: every "
    "layer becomes one of attention and one MLP, over the same pipeline stages",
}


def add_infoentropy_args(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add a flag for every field of InfoEntropyConfig; an `extra_args_provider` for any script."""
    group = parser.add_argument_group("InfoEntropy loss")
    for field in dataclasses.fields(InfoEntropyConfig):
        kind: dict[str, Any] = {"type": field.type}
        if field.type is bool:
            kind = {"action": argparse.BooleanOptionalAction}
        elif get_origin(field.type) is Literal:
            kind = {"choices": get_args(field.type)}
        group.add_argument(
            f"--{PREFIX}-{field.name.replace('_', '-')}",
            default=field.default,
            help=f"{field.metadata['help']} (default: {field.default})".replace("%", "%%"),
            **kind,
        )
    return parser


def add_trainer_args(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Those, and those of what only `megatron_infoentropy.pretrain` does."""
    group = add_infoentropy_args(parser).add_argument_group("InfoEntropy trainer")
    group.add_argument(
        f"--{PREFIX}-histogram-interval",
        type=int,
        default=0,
        help="training steps between histograms of entropies and weights for TensorBoard and W&B, "
        "a multiple of --log-interval; 0 is none (default: 0)",
    )
    for name, help_text in SWITCHES.items():
        group.add_argument(f"--{name}", action="store_true", help=help_text)
    add_checkpoint_flags(parser.add_argument_group("InfoEntropy checkpoints"))
    return parser


def config_from_args(args: argparse.Namespace) -> InfoEntropyConfig:
    """The configuration that the parsed flags describe."""
    names = [field.name for field in dataclasses.fields(InfoEntropyConfig)]
    return InfoEntropyConfig(**{name: getattr(args, f"{PREFIX}_{name}") for name in names})


def check_megatron_args(args: argparse.Namespace, config: InfoEntropyConfig) -> None:
    """Refuse, before anything is built, what cannot work together."""
    # --hybrid-override-pattern is turned into this one.
    pattern = getattr(args, "hybrid_layer_pattern", None)
    is_of_heads = config.mtp_loss == "weighted"
    for beside, is_given, reasons in (
        ("", True, UNSERVED),
        (f"--{PREFIX}-conversations", getattr(args, f"{PREFIX}_conversations", 0), CONVERSATIONS),
        (f"--{PREFIX}-mtp-loss weighted", is_of_heads, UNWEIGHTED),
        (f"--hybrid-layer-pattern {pattern}", pattern is not None, UNHYBRID),
        (f"--{PREFIX}-fused-linear", config.fused_linear, UNFUSED),
        (f"--{PREFIX}-normalization global", config.normalization == "global", UNSCALED),
    ):
        if is_given:
            _refuse(args, reasons, beside)
    for is_wrong, sentence in _contradictions(args, config):
        if is_wrong:
            raise ValueError(sentence)
    if pattern is not None:
        _check_hybrid_model(args, pattern)
    config.require_export([NO_EXPORT] * getattr(args, "infoentropy_no_export", False))
    device, rank = find_device().type, getattr(args, "local_rank", 0)
    check_weighting(config, device if device == "cpu" else f"{device}:{rank}")


def _refuse(args: argparse.Namespace, reasons: dict[str, str], beside: str) -> None:
    """Refuse the first of these flags that is given, `beside` another or, where "", in any case."""
    for name, reason in reasons.items():
        if getattr(args, name, None):
            flag = f"--{name.replace('_', '-')}"
            what = f"{beside} cannot go with {flag}" if beside else f"{flag} is refused"
            raise ValueError(f"{what}: {reason}")


def _contradictions(
    args: argparse.Namespace, config: InfoEntropyConfig
) -> Iterator[tuple[bool, str]]:
    """Yield whether it is so, and what is said then, of every number or choice that is refused."""
    for name, value in vars(args).items():
        flag = f"--{name.replace('_', '-')}"
        is_wrong = isinstance(value, float) and not math.isfinite(value)
        yield is_wrong, f"{flag} must be a finite number, got {value}"
    instances = getattr(args, "num_distributed_optimizer_instances", 1)
    yield (
        instances > 1 and args.data_parallel_size % instances > 0,
        f"--num-distributed-optimizer-instances {instances} must divide the "
        f"{getattr(args, 'data_parallel_size', 1)} data-parallel ranks",
    )
    interval = getattr(args, f"{PREFIX}_histogram_interval", 0)
    logs = getattr(args, "log_interval", 1)
    yield (
        interval < 0 or interval % logs > 0,
        f"--{PREFIX}-histogram-interval must be a multiple of --log-interval ({logs}), got "
        f"{interval}: histograms are drawn where a line is logged",
    )
    yield (
        config.mtp_loss == "weighted" and not args.mtp_num_layers,
        f"--{PREFIX}-mtp-loss weighted has no effect without multi-token-prediction heads: add "
        "--mtp-num-layers, or / and the heads' layers to --hybrid-layer-pattern, or leave it out",
    )
    yield (
        config.fused_linear and getattr(args, "gtp_weight_remat_size", 1) > 1,
        f"--{PREFIX}-fused-linear cannot go with --tensor-parallel-num-weight-shards: it gathers "
        "the weight when the output layer is called; leave one of them out",
    )
    yield (
        getattr(args, "cuda_graph_impl", "none") == "full_iteration",
        "--cuda-graph-impl full_iteration is refused: it would replay one step's gamma and "
        "reports for ever; use local or transformer_engine, which capture the layers",
    )


def _check_hybrid_model(args: argparse.Namespace, pattern: str) -> None:
    if args.position_embedding_type in ("mrope", "relative"):
        raise ValueError(
            f"--hybrid-layer-pattern {pattern} cannot go with --position-embedding-type "
            f"{args.position_embedding_type}, which Megatron's HybridModel ignores; use rope, "
            "yarn, learned_absolute or none"
        )
    others = "".join(sorted(set(pattern) - set(LOCAL_LAYERS + BOUNDARIES)))
    if args.transformer_impl == "local" and args.spec is None and others:
        raise ValueError(
            f"--hybrid-layer-pattern {pattern}: with --transformer-impl local, as on a CPU, layers "
            f"are attention (*) or MLP (-), got {others}; others are built from Transformer Engine "
            "and, for Mamba (M), mamba_ssm, whose kernels need a GPU"
        )
    if "M" in others and find_spec("mamba_ssm") is None:
        raise ValueError(
            f"--hybrid-layer-pattern {pattern} has Mamba layers (M), which need the package "
            "mamba_ssm and a GPU: install mamba-ssm and causal-conv1d, or use attention (*) and "
            "MLP (-) layers alone"
        )


def require_per_token_loss(args: argparse.Namespace, config: InfoEntropyConfig) -> bool:
    """Let Megatron sum, not average, per-token losses where "global" divides them later.

    Returns whether anything was changed.
    """
    if config.normalization != "global" or args.calculate_per_token_loss:
        return False
    args.calculate_per_token_loss = True
    return True


IGNORANT_FACTOR = 8.0  # of rotary scaling, where a trainer does not hand on --rope-scaling-factor


def other_objective(saved: argparse.Namespace, config: InfoEntropyConfig) -> str | None:
    """A sentence that names both objectives where a checkpoint's differs from `config`, else None.

    saved: the arguments in the checkpoint.
    """
    before: dict[str, Any] = {
        f.name: f.default for f in dataclasses.fields(InfoEntropyConfig) if f.name not in MEANS
    }
    whose = "the checkpoint was trained with"
    if hasattr(saved, f"{PREFIX}_objective"):
        # A checkpoint of an earlier version lacks the newer fields, or says None of one: they had
        # their defaults.
        said = {name: getattr(saved, f"{PREFIX}_{name}", None) for name in before}
        before |= {name: value for name, value in said.items() if value is not None}
    else:
        before["objective"] = "cross_entropy"
        whose += " Megatron's own cross entropy,"
    try:
        theirs = dataclasses.replace(config, **before).effective()
    except ValueError as error:  # of an earlier version, which took them
        return f"{whose} settings that are refused now: {error}"
    ours = config.effective()
    if theirs == ours:
        return None
    names = [n for n in before if n == "objective" or getattr(theirs, n) != getattr(ours, n)]
    them, us = (" ".join(f"{n}={getattr(each, n)}" for n in names) for each in (theirs, ours))
    return f"{whose} {them} and this run goes on with {us}"


def check_rope_scaling(saved: argparse.Namespace | None, args: argparse.Namespace) -> None:
    """Refuse to go on, with another rotary scaling, from a trainer that ignored the argument."""
    if saved is None or not getattr(saved, "use_rope_scaling", False):
        return
    said, ours = saved.rope_scaling_factor, args.rope_scaling_factor
    if hasattr(saved, f"{PREFIX}_rope_scaling_factor") or IGNORANT_FACTOR in (said, ours):
        return
    raise ValueError(
        f"the checkpoint says --rope-scaling-factor {said:g}, but its trainer does not say that it "
        f"obeyed: Megatron-Core up to 0.19.2 trains with {IGNORANT_FACTOR:g} whatever is asked "
        f"for; go on with --rope-scaling-factor {IGNORANT_FACTOR:g}, or, if you know that the "
        f"model has {said:g}, start from a copy that `infoentropy convert --rope-scaling-factor "
        f"{said:g}` and `infoentropy convert-from-hf` make"
    )


def saved_arguments(
    args: argparse.Namespace, flag: Literal["load", "pretrained_checkpoint"]
) -> argparse.Namespace | None:
    """The arguments in the checkpoint that a flag names; None where there is none yet."""
    if not getattr(args, flag):
        return None
    from megatron.training.checkpointing import load_args_from_checkpoint

    # It changes what it is given, and returns that alone where it finds nothing.
    answer = load_args_from_checkpoint(copy.deepcopy(args), load_arg=flag)
    return answer[1] if isinstance(answer, tuple) else None
