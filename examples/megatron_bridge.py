"""The loss in Megatron-Bridge: a pre-wrap hook on the model's configuration.

Run it, on GPUs: `torchrun --nproc-per-node 1 examples/megatron_bridge.py`. Megatron-Bridge needs
Transformer Engine; this file was written from the source of version 0.6.2, and only the hook was
run, on lists of models of megatron-core 0.17, 0.18 and 0.19.
"""

from collections.abc import Callable
from typing import Any

from megatron_infoentropy import InfoEntropyConfig


def infoentropy_hook(config: InfoEntropyConfig) -> Callable[[list[Any]], list[Any]]:
    """A function on the list of this rank's model chunks, before they are wrapped."""

    def bind(chunks: list[Any]) -> list[Any]:
        from megatron.core import parallel_state

        from megatron_infoentropy.integration import use_infoentropy_loss

        # The published alpha is a mean over data-parallel ranks, and needs to know them.
        group = parallel_state.get_data_parallel_group(with_context_parallel=True)
        return use_infoentropy_loss(chunks, config, data_parallel_group=group)

    return bind


def main() -> None:
    from megatron.bridge.recipes.llama import llama32_1b_pretrain_config
    from megatron.bridge.training.gpt_step import forward_step
    from megatron.bridge.training.pretrain import pretrain

    recipe = llama32_1b_pretrain_config()
    hook = infoentropy_hook(InfoEntropyConfig(gamma=1.0))
    if hasattr(recipe.model, "pre_wrap_hooks"):  # a ModelConfig
        recipe.model.pre_wrap_hooks.append(hook)
    else:  # a model provider
        recipe.model.register_pre_wrap_hook(hook)
    pretrain(recipe, forward_step)


if __name__ == "__main__":
    main()
