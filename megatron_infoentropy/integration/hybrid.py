"""The layers of a HybridModel without Transformer Engine.

A module of its own, since a subclass has to import Megatron's stack: `compat`, which asks for it,
is imported before Megatron is, and beside versions that have none.

Megatron 0.19 has a local specification of GPTModel's layers and none of HybridModel's: whatever
--transformer-impl says, its attention and MLP layers and its last norm are Transformer Engine's.
"""

from dataclasses import replace
from typing import Any

from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.models.hybrid.hybrid_block import HybridStack, HybridStackSubmodules
from megatron.core.ssm.mlp_layer import MLPLayer
from megatron.core.tensor_parallel import ColumnParallelLinear
from megatron.core.transformer.identity_op import IdentityFuncOp, IdentityOp
from megatron.core.transformer.multi_token_prediction import (
    MultiTokenPredictionBlock,
    MultiTokenPredictionBlockSubmodules,
    MultiTokenPredictionLayer,
    MultiTokenPredictionLayerSubmodules,
)
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.transformer_layer import TransformerLayer


class LocalHybridStack(HybridStack):  # type: ignore[misc]
    """Megatron's stack of layers, its last norm of the kind that the layers have."""

    def __init__(self, config: Any, submodules: HybridStackSubmodules, **options: Any) -> None:
        super().__init__(config, submodules, **options, post_layer_norm=False)
        if self.post_process:
            self.post_layer_norm = True
            self.final_norm = build_module(
                submodules.mlp_layer.submodules.pre_mlp_layernorm,
                config=config,
                hidden_size=config.hidden_size,
                eps=config.layernorm_epsilon,
            )


def local_stack_spec(config: Any) -> ModuleSpec:
    """Return the specification of a stack of attention and MLP layers from Megatron-Core alone.

    Each is half of a local GPT layer and is named in checkpoints as with Transformer Engine, also
    in prediction heads.

    config: Megatron's TransformerConfig.
    """
    layer = get_gpt_layer_local_spec(
        qk_layernorm=config.qk_layernorm,
        normalization=config.normalization,
        qk_l2_norm=config.qk_l2_norm,
    ).submodules
    attention = replace(layer, pre_mlp_layernorm=IdentityOp, mlp=IdentityOp, mlp_bda=IdentityFuncOp)
    mlp = replace(
        layer,
        input_layernorm=IdentityOp,
        self_attention=IdentityOp,
        self_attn_bda=IdentityFuncOp,
    )
    norm = layer.pre_mlp_layernorm
    head = MultiTokenPredictionLayerSubmodules(
        enorm=norm, hnorm=norm, layer_norm=norm, eh_proj=ColumnParallelLinear
    )
    heads = MultiTokenPredictionBlockSubmodules(
        layer_specs=[ModuleSpec(module=MultiTokenPredictionLayer, submodules=head)]
    )
    return ModuleSpec(
        module=LocalHybridStack,
        submodules=HybridStackSubmodules(
            attention_layer=ModuleSpec(module=TransformerLayer, submodules=attention),
            mlp_layer=ModuleSpec(module=MLPLayer, submodules=mlp),
            mtp_block_spec=ModuleSpec(module=MultiTokenPredictionBlock, submodules=heads),
        ),
    )
