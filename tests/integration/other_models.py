"""Megatron's language models beside GPTModel, of local layers, each with a batch for its forward.

Each function gives (model, arguments of its forward, which of them are the labels).
"""

import torch
from megatron.core.models.bert import bert_layer_specs
from megatron.core.models.bert.bert_model import BertModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.models.T5 import t5_spec
from megatron.core.models.T5.t5_model import T5Model
from megatron.core.transformer.spec_utils import ModuleSpec

try:
    from megatron.core.models.hybrid import hybrid_block
    from megatron.core.models.hybrid import hybrid_model as hybrid
except ImportError:  # 0.17
    hybrid = None
    from megatron.core.models.mamba import mamba_model
    from megatron.core.ssm import mamba_block


def hybrid_model(model_config, vocab, sequence, tokens, labels):
    """Attention and MLP layers; a Mamba layer takes mamba_ssm, which takes a GPU."""
    from megatron.core.ssm.mlp_layer import MLPLayer
    from megatron.core.transformer.torch_norm import WrappedTorchNorm
    from megatron.core.transformer.transformer_layer import TransformerLayer

    layer = get_gpt_layer_local_spec().submodules
    block = hybrid_block if hybrid else mamba_block
    block.TENorm = WrappedTorchNorm  # Transformer Engine's, the only one that the stack asks for
    stack, submodules = (
        (block.HybridStack, block.HybridStackSubmodules)
        if hybrid
        else (block.MambaStack, block.MambaStackSubmodules)
    )
    parts = type(layer)
    attention = parts(
        input_layernorm=layer.input_layernorm,
        self_attention=layer.self_attention,
        self_attn_bda=layer.self_attn_bda,
    )
    mlp = parts(pre_mlp_layernorm=layer.pre_mlp_layernorm, mlp=layer.mlp, mlp_bda=layer.mlp_bda)
    spec = ModuleSpec(
        module=stack,
        submodules=submodules(
            attention_layer=ModuleSpec(module=TransformerLayer, submodules=attention),
            mlp_layer=ModuleSpec(module=MLPLayer, submodules=mlp),
        ),
    )
    model = (hybrid.HybridModel if hybrid else mamba_model.MambaModel)(
        model_config(), spec, vocab, sequence, hybrid_layer_pattern="*-"
    )
    future = torch.ones(1, 1, sequence, sequence, dtype=torch.bool).triu(1)
    arguments = {"input_ids": tokens, "position_ids": None, "attention_mask": future}
    return model, arguments | {"labels": labels}, "labels"


def t5_model(model_config, vocab, sequence, tokens, labels):
    config = model_config()
    model = T5Model(
        config,
        config,
        t5_spec.get_t5_encoder_with_local_block_spec(config.num_layers),
        t5_spec.get_t5_decoder_with_local_block_spec(config.num_layers),
        vocab,
        sequence,
        share_embeddings_and_output_weights=True,
    )
    seen = torch.zeros(len(tokens), 1, sequence, sequence, dtype=torch.bool)
    arguments = {
        "encoder_input_ids": tokens,
        "decoder_input_ids": tokens,
        "encoder_attn_mask": seen,
        "decoder_attn_mask": seen,
        "encoder_decoder_attn_mask": seen,
    }
    return model, arguments | {"lm_labels": labels}, "lm_labels"


def bert_model(model_config, vocab, sequence, tokens, labels):
    model = BertModel(
        model_config(),
        0,
        bert_layer_specs.bert_layer_local_spec,
        vocab,
        sequence,
        share_embeddings_and_output_weights=True,
        add_binary_head=False,
    )
    arguments = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    return model, arguments | {"lm_labels": labels}, "lm_labels"
