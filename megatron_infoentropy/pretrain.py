"""Pre-train a GPT with the InfoEntropy loss: `torchrun -m megatron_infoentropy.pretrain FLAGS`.

This is Megatron's own `pretrain` with all of Megatron's flags, plus `--infoentropy-*`. On a machine
without a GPU it runs on the CPU.
"""

import gc
import os
import signal
import sys
from argparse import Namespace
from functools import partial
from typing import Any

from megatron_infoentropy.runtime import cpu, orphans


def prepare() -> tuple[Any, Any]:
    """What `megatron.training.pretrain` needs, from the command line: (container, forward step).

    Raises:
        ValueError: settings that cannot work together, before anything is built.
    """
    from megatron.core.distributed import finalize_model_grads
    from megatron.training import get_args, get_tokenizer, print_rank_0
    from megatron.training.argument_utils import pretrain_cfg_container_from_args
    from megatron.training.arguments import parse_and_validate_args

    from megatron_infoentropy.integration import arguments
    from megatron_infoentropy.integration.batch import embedding_ranks
    from megatron_infoentropy.integration.compat import make_hybrid, model_config_from_args
    from megatron_infoentropy.integration.observe import TokenObserver, announce_size, observed
    from megatron_infoentropy.integration.step import GlobalBatchWeight, InfoEntropyForwardStep

    parse_and_validate_args(extra_args_provider=arguments.add_trainer_args)
    args = get_args()
    config = arguments.config_from_args(args)
    if args.infoentropy_hybrid:
        make_hybrid(args)
    arguments.check_megatron_args(args, config)
    print_rank_0(f"objective: {config}")
    saved = arguments.saved_arguments(args, "load")
    start = saved or arguments.saved_arguments(args, "pretrained_checkpoint")
    arguments.check_rope_scaling(start, args)
    difference = None if saved is None else arguments.other_objective(saved, config)
    if difference is not None:
        print_rank_0(f"WARNING: {difference}")
    if arguments.require_per_token_loss(args, config):
        print_rank_0("--calculate-per-token-loss is on: 'global' divides the gradients itself")

    vocab_size = set_vocabulary(args, get_tokenizer().vocab_size)
    model_config = model_config_from_args(args)
    embedding_ranks(model_config, list(range(args.pipeline_model_parallel_size)))  # can it be?
    model_config.pre_wrap_hooks.append(announce_size)
    if args.infoentropy_unscaled_init:
        model_config.transformer.output_layer_init_method = model_config.transformer.init_method
    is_global = config.normalization == "global"
    batch_weight = GlobalBatchWeight(args.global_batch_size * args.seq_length if is_global else 1)
    observer = TokenObserver(vocab_size)
    finalize = finalize_model_grads
    if args.calculate_per_token_loss:
        finalize = batch_weight.finalize_per_token
    if is_global:
        finalize = batch_weight.finalize_model_grads
    model_config.transformer.finalize_model_grads_func = observed(
        finalize, observer, args.infoentropy_histogram_interval
    )
    forward_step = InfoEntropyForwardStep(config, vocab_size, batch_weight, observer)
    return pretrain_cfg_container_from_args(args, model_config), forward_step


def run(container: Any, forward_step: Any) -> None:
    """Call Megatron's `pretrain` with what `prepare` returned, on our datasets."""
    from megatron.core.enums import ModelType
    from megatron.training import pretrain

    from megatron_infoentropy.integration.batch import build_datasets, embedding_ranks

    pretrain(
        *(container, build_datasets, ModelType.encoder_or_decoder, forward_step),
        get_embedding_ranks=partial(embedding_ranks, container.model),
    )


def set_vocabulary(args: Namespace, tokens: int) -> int:
    """Return the true vocabulary: --vocab-size where that is more than the tokenizer's tokens.

    Megatron goes by the tokenizer alone. A model from elsewhere may have more rows, as every Qwen
    and Pythia has: they are part of its softmax. The checkpoint's arguments say both numbers.
    """
    rows: int = args.vocab_size or 0
    if rows <= tokens:
        return tokens
    from megatron.core.tokenizers.utils.build_tokenizer import vocab_size_with_padding

    args.infoentropy_tokens = tokens
    if args.padded_vocab_size < rows:
        args.padded_vocab_size = vocab_size_with_padding(rows, args)
    return rows


def train() -> None:
    """Train as the command line says, from the newest complete checkpoint; every rank runs this.

    Raises:
        ValueError: settings that cannot work together, or no checkpoint that can be loaded.
    """
    from megatron_infoentropy.integration import checkpoints

    flags = checkpoints.checkpoint_flags(sys.argv[1:])
    warnings = checkpoints.choose_checkpoint(flags)
    container, forward_step = prepare()
    container.model.pre_wrap_hooks.append(partial(checkpoints.warn, warnings))
    after = signal.SIG_DFL  # a rank that has failed ends when torchrun says so
    try:
        with checkpoints.writing_manifests(flags, forward_step) as step:
            run(container, step)
        after = signal.SIG_IGN
    except SystemExit:  # Megatron's end after an order to save
        after = signal.SIG_IGN
        raise
    finally:
        # node.sh repeats its order to save until the ranks are gone, and Python ends with the
        # default handlers: the signal would kill a rank that has saved. An ignored one stays so.
        signal.signal(signal.SIGTERM, after)


def main() -> None:
    """The command."""
    orphans.leave_none()
    gc.disable()  # nothing imported is garbage; to look through it all takes a second
    cpu.install()  # before megatron is imported; does nothing where there is a GPU

    from megatron_infoentropy.integration.compat import check_trainer, prepare_megatron

    check_trainer()  # before anything that only 0.19 has is imported
    prepare_megatron()

    from megatron.training import pretrain  # noqa: F401

    gc.enable()
    gc.freeze()
    try:
        train()
    finally:
        gc.unfreeze()  # libraries complain at the end of what was not freed


if __name__ == "__mp_main__":  # imported by a process that a rank has spawned
    # Slurm sends it to every process; without its helpers a rank cannot save.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    orphans.end_with(os.getppid())
if __name__ == "__main__":
    main()
