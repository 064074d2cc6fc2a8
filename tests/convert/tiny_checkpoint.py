"""Small checkpoints in Megatron's format, written without Megatron, for what needs no training."""

import json
import warnings
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import DefaultSavePlanner

_ARGS: dict[str, Any] = {
    "num_layers": 2,
    "hidden_size": 32,
    "ffn_hidden_size": 48,
    "num_attention_heads": 4,
    "group_query_attention": True,
    "num_query_groups": 2,
    "kv_channels": 8,
    "layernorm_epsilon": 1e-5,
    "layernorm_zero_centered_gamma": False,
    "rotary_base": 10000,
    "rotary_percent": 1.0,
    "rotary_interleaved": False,
    "max_position_embeddings": 64,
    "vocab_size": 60,
    "padded_vocab_size": 64,
    "untie_embeddings_and_output_weights": True,
    "init_method_std": 0.02,
    "normalization": "RMSNorm",
    "swiglu": True,
    "position_embedding_type": "rope",
    "add_bias_linear": False,
}
_LAYERS = "decoder.layers."
_LOCAL_NAMES = {  # Transformer Engine's place of a norm: where the local layers have it
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
}
TOKENS = [[(7 * i * i + 3 * i + start) % 60 for i in range(48)] for start in (0, 11)]


def tiny_args(**changes: Any) -> Namespace:
    """The training arguments of a Llama model, changed as said."""
    return Namespace(**(_ARGS | changes))


def tiny_tensors(args: Namespace, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Random parameters, the layers stacked, large enough that logits spread over several nats."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int, around: float = 0.0) -> Tensor:
        return (around + 0.3 * torch.randn(shape, generator=generator)).to(dtype)

    layers, hidden, ffn, width = (
        args.num_layers,
        args.hidden_size,
        args.ffn_hidden_size,
        args.kv_channels,
    )
    groups = args.num_query_groups if args.group_query_attention else args.num_attention_heads
    rows = (args.num_attention_heads + 2 * groups) * width
    one = 0.0 if args.layernorm_zero_centered_gamma else 1.0
    tensors = {
        "embedding.word_embeddings.weight": draw(args.padded_vocab_size, hidden),
        _LAYERS + "self_attention.linear_qkv.layer_norm_weight": draw(layers, hidden, around=one),
        _LAYERS + "self_attention.linear_qkv.weight": draw(layers, rows, hidden),
        _LAYERS + "self_attention.linear_proj.weight": draw(
            layers, hidden, args.num_attention_heads * width
        ),
        _LAYERS + "mlp.linear_fc1.layer_norm_weight": draw(layers, hidden, around=one),
        _LAYERS + "mlp.linear_fc1.weight": draw(layers, 2 * ffn, hidden),
        _LAYERS + "mlp.linear_fc2.weight": draw(layers, hidden, ffn),
        "decoder.final_layernorm.weight": draw(hidden, around=one),
    }
    if args.untie_embeddings_and_output_weights:
        tensors["output_layer.weight"] = draw(args.padded_vocab_size, hidden)
    return tensors


def unstacked(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same parameters with one entry a layer, and norms named as by the local layers."""
    result = {}
    for name, tensor in tensors.items():
        if not name.startswith(_LAYERS):
            result[name] = tensor
            continue
        rest = name.removeprefix(_LAYERS)
        for layer, part in enumerate(tensor):
            result[f"{_LAYERS}{layer}.{_LOCAL_NAMES.get(rest, rest)}"] = part.clone()
    return result


def write_checkpoint(
    folder: Path, args: Namespace, tensors: dict[str, Tensor], *, legacy: bool = False
) -> Path:
    """Write iteration 7 below `folder`; `legacy` puts the arguments into common.pt."""
    iteration = folder / "iter_0000007"
    iteration.mkdir(parents=True)
    common = {"args": args, "iteration": 7, "checkpoint_version": 3.0}
    entries: dict[str, Any] = dict(tensors)
    entries["optimizer.state.exp_avg.output_layer.weight"] = torch.zeros(2, 2)
    entries["decoder.layers.mlp.linear_fc1._extra_state/shard_0_2"] = None
    if legacy:
        torch.save(common, iteration / "common.pt")
    else:
        entries["common_state/shard_0_1"] = [common]
    # Megatron's names are not to be made of nested ones, as the default would.
    planner = DefaultSavePlanner(flatten_state_dict=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that there is one process
        dcp.save(entries, checkpoint_id=iteration, planner=planner, no_dist=True)
    (iteration / "metadata.json").write_text(json.dumps({"sharded_backend": "torch_dist"}))
    (folder / "latest_checkpointed_iteration.txt").write_text("7")
    return folder
