"""transformers' model with one layer's weights, or expert's, in memory, for models beyond it."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from megatron_infoentropy.convert.errors import IncompleteCheckpointError
from megatron_infoentropy.convert.hf_weights import HuggingFaceWeights, parameter_names
from megatron_infoentropy.convert.naming import TABLES, Row

_RENAMED = {"embed_out.weight": "lm_head.weight"}  # of GPT-NeoX, since transformers 5


def streamed_model(folder: Path, config: Any) -> Any:
    """Return the model of a folder in fp32; each layer is read when it is run, and then forgotten.

    So is each expert: transformers has one tensor for those of a layer, but takes one at a time.


    Args:
        folder: the Hugging Face folder.
        config: its configuration, as transformers loaded it.

    Raises:
        IncompleteCheckpointError: the folder lacks weights, or has more than the model.
    """
    from transformers import AutoModelForCausalLM

    config._experts_implementation = "eager"
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    base = model.base_model
    if hasattr(base, "rotary_emb"):  # its frequencies are computed, not stored
        base.rotary_emb = type(base.rotary_emb)(config)
    layers = base.h if config.model_type == "gpt2" else base.layers
    prefix = next(name for name, module in model.named_modules() if module is layers) + "."
    weights = HuggingFaceWeights(folder)
    stored = parameter_names(weights.tensors, config.model_type)
    outside = {_RENAMED.get(n, n): at for n, at in stored.items() if not n.startswith(prefix)}
    _load(model, weights, outside, strict=False)
    model.tie_weights()
    for name, parameter in model.named_parameters():
        if parameter.is_meta and not name.startswith(prefix):
            raise IncompleteCheckpointError(f"{folder} lacks the tensor {name}")
    for number, layer in enumerate(layers):
        start = f"{prefix}{number}."
        of_experts = _replace_experts(layer, number, weights, config)
        names = {
            n.removeprefix(start).replace("block_sparse_moe.", "mlp."): at
            for n, at in stored.items()
            if n.startswith(start) and n not in of_experts
        }
        layer.register_forward_pre_hook(
            lambda module, _, names=names: _load(module, weights, names, strict=True)
        )
        layer.register_forward_hook(lambda module, *_: _forget(module))
    return model


class _Experts:
    """A layer's experts in the place of their one tensor, each read when it is asked for."""

    def __init__(self, weights: HuggingFaceWeights, names: list[tuple[str, ...]]) -> None:
        self._weights, self._names = weights, names

    def __getitem__(self, expert: Tensor) -> Tensor:
        return torch.cat([self._weights.read(name).float() for name in self._names[int(expert)]])


def _replace_experts(
    layer: nn.Module, number: int, weights: HuggingFaceWeights, config: Any
) -> set[str]:
    """Let a layer's experts be read one by one; return the names of their matrices."""
    rows: list[Row] = [
        row for row in TABLES.get(config.model_type, ()) if row.megatron.count("*") == 2
    ]
    replaced: set[str] = set()
    for row, attribute in zip(rows, ("gate_up_proj", "down_proj"), strict=False):
        names = [row.names((number, expert)) for expert in range(config.num_local_experts)]
        replaced |= {name for each in names for name in each}
        experts: Any = layer.get_submodule("mlp.experts")
        delattr(experts, attribute)
        setattr(experts, attribute, _Experts(weights, names))
    if missing := sorted(replaced - weights.tensors.keys()):
        raise IncompleteCheckpointError(f"the folder lacks the tensor {missing[0]}")
    return replaced


def _load(
    module: nn.Module, weights: HuggingFaceWeights, names: dict[str, str], *, strict: bool
) -> None:
    """Read {name in the module: name in the folder}."""
    state = {name: weights.read(stored).float() for name, stored in names.items()}
    try:
        _, unexpected = module.load_state_dict(state, strict=strict, assign=True)
    except RuntimeError as error:
        raise IncompleteCheckpointError(f"the weights do not fit config.json: {error}") from None
    if unexpected:
        raise IncompleteCheckpointError(f"config.json describes no {', '.join(unexpected)}")


def _forget(module: nn.Module) -> None:
    module.to_empty(device="meta")
