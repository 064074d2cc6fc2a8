"""Small checkpoints of Megatron's models, with random parameters, for what needs no training."""

import json
import warnings
from argparse import Namespace
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.checkpoint import DefaultSavePlanner

from megatron_infoentropy.convert import convert_checkpoint
from megatron_infoentropy.convert.megatron_model import build_model, one_cpu_rank

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
    "bias_gelu_fusion": False,
    "rope_scaling_factor": 8.0,
}
_GELU: dict[str, Any] = {
    "normalization": "LayerNorm",
    "swiglu": False,
    "add_bias_linear": True,
    "group_query_attention": False,
    "num_query_groups": 1,
}
_EXPERTS: dict[str, Any] = {
    "num_experts": 4,
    "moe_router_topk": 2,
    "moe_ffn_hidden_size": 24,
    "moe_router_pre_softmax": False,
    "moe_aux_loss_coeff": 0.01,
    "moe_router_load_balancing_type": "aux_loss",
}
FAMILIES: dict[str, dict[str, Any]] = {  # name of the Hugging Face class: what is different
    "llama": {},
    "qwen2": {"add_qkv_bias": True},
    "qwen3": {"qk_layernorm": True},
    "mixtral": _EXPERTS,
    "qwen3_moe": _EXPERTS | {"qk_layernorm": True, "moe_router_pre_softmax": True},
    "gpt_neox": _GELU | {"rotary_percent": 0.5},
    "gpt2": _GELU
    | {
        "position_embedding_type": "learned_absolute",
        "bias_gelu_fusion": True,
        "untie_embeddings_and_output_weights": False,
    },
}
_DESCRIBE = {name for changes in (_ARGS, *FAMILIES.values()) for name in changes}
_LAYERS = "decoder.layers."
_LOCAL_NAMES = {  # Transformer Engine's place of a norm: where the local layers have it
    "self_attention.linear_qkv.layer_norm_": "input_layernorm.",
    "mlp.linear_fc1.layer_norm_": "pre_mlp_layernorm.",
}
LLAMA_3 = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0}
LLAMA_3 |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
TOKENS = [[(7 * i * i + 3 * i + start) % 60 for i in range(48)] for start in (0, 11)]


def tiny_args(**changes: Any) -> Namespace:
    """The training arguments of a Llama model, changed as said."""
    return Namespace(**(_ARGS | changes))


def tiny_tensors(args: Namespace, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Random parameters, the layers stacked, large enough that logits spread over several nats."""
    generator = torch.Generator().manual_seed(0)
    described = {name: value for name, value in vars(args).items() if name in _DESCRIBE}
    tensors = {}
    for name, shape in _shapes(json.dumps(described, sort_keys=True)):
        is_norm = name.endswith(("norm.weight", "layer_norm_weight"))
        around = float(is_norm and not args.layernorm_zero_centered_gamma)
        tensors[name] = (around + 0.3 * torch.randn(shape, generator=generator)).to(dtype)
    return tensors


@cache
def _shapes(args: str) -> list[tuple[str, tuple[int, ...]]]:
    """The names and shapes under which Megatron's own model of these arguments is saved."""
    with one_cpu_rank():
        from megatron.core.dist_checkpointing import mapping
        from megatron.core.dist_checkpointing.dict_utils import nested_values

        state = build_model(Namespace(**json.loads(args))).sharded_state_dict()
        mapping.apply_factories(state)
        stored = [t for t in nested_values(state) if isinstance(t, mapping.ShardedTensor)]
    return sorted({t.key: tuple(t.global_shape) for t in stored}.items())


def unstacked(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same parameters with one entry a layer, and norms named as by the local layers."""
    result = {}
    for name, tensor in tensors.items():
        if not name.startswith(_LAYERS):
            result[name] = tensor
            continue
        rest = name.removeprefix(_LAYERS)
        for there, here in _LOCAL_NAMES.items():
            rest = rest.replace(there, here)
        for layer, part in enumerate(tensor):
            result[f"{_LAYERS}{layer}.{rest}"] = part.clone()
    return result


def hybrid_twin(args: Namespace, tensors: dict[str, Tensor], separator: str = "") -> Any:
    """The same model as Megatron's HybridModel has it: (arguments, parameters).

    Attention at even places, the MLP of the same layer behind it.
    """
    halves = {"self_attention": 0, "input_layernorm": 0, "mlp": 1, "pre_mlp_layernorm": 1}
    pattern = separator.join(["*-"] * args.num_layers)
    changes = {"hybrid_layer_pattern": pattern, "num_layers": 2 * args.num_layers}
    twin = {}
    for name, tensor in tensors.items():
        if not name.startswith(_LAYERS):
            twin[name.replace("final_layernorm", "final_norm")] = tensor
            continue
        rest = name.removeprefix(_LAYERS)
        for layer, part in enumerate(tensor):
            number = 2 * layer + halves[rest.split(".")[0]]
            twin[f"{_LAYERS}{number}.{rest}"] = part.clone()
    return Namespace(**vars(args) | changes), twin


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


def write_tiny(folder: Path, dtype: torch.dtype = torch.float32, **changes: Any) -> Path:
    """Write a checkpoint of `tiny_args(**changes)` and its random parameters."""
    args = tiny_args(**changes)
    return write_checkpoint(folder, args, tiny_tensors(args, dtype))


def export_tiny(folder: Path, dtype: torch.dtype = torch.float32, **changes: Any) -> Path:
    """Write such a checkpoint `save` and its export `hf`; return their folder."""
    convert_checkpoint(write_tiny(folder / "save", dtype, **changes), folder / "hf")
    return folder


def weights_of(folder: Path) -> dict[str, Tensor]:
    """All tensors of an exported folder."""
    files = sorted(folder.glob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def same(first: Path, second: Path) -> bool:
    """Whether two exported folders hold the same tensors to the bit."""
    one, other = weights_of(first), weights_of(second)
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


class Harmful:
    """Pickles as a call of the function it is given."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call
