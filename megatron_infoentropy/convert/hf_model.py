"""Models of transformers: of a folder, whole or layer by layer, and of a checkpoint itself."""

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_infoentropy.checkpoints import TRACKER
from megatron_infoentropy.convert.architecture import CLASSES, OF_EXPERTS, architecture_of
from megatron_infoentropy.convert.checkpoint import MegatronCheckpoint
from megatron_infoentropy.convert.errors import ConversionError
from megatron_infoentropy.convert.hf_config import hf_config
from megatron_infoentropy.convert.hf_weights import HuggingFaceWeights
from megatron_infoentropy.convert.layers import read_when_run
from megatron_infoentropy.convert.naming import match_names
from megatron_infoentropy.convert.to_hf import convert_steps
from megatron_infoentropy.convert.tokenizer import read_tokenizer
from megatron_infoentropy.data.manifest import load_manifest

_RENAMED = (  # in files: in transformers 5
    ("embed_out.", "lm_head."),
    ("block_sparse_moe.", "mlp."),
    (".w1.", ".gate_proj."),
    (".w2.", ".down_proj."),
    (".w3.", ".up_proj."),
)
_OF_EXPERT = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}


def whole_model(folder: Path) -> Any:
    """Return a folder's model in fp32, loaded by transformers' own means."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        str(folder),
        local_files_only=True,
        trust_remote_code=False,
        use_safetensors=True,
        dtype=torch.float32,
    ).eval()


def streamed_model(folder: Path, config: Any) -> Any:
    """Return a folder's model in fp32 with one layer's weights, or one expert's, in memory.

    Args:
        folder: the Hugging Face folder.
        config: its configuration, as transformers loaded it.
    """
    from transformers import AutoModelForCausalLM

    config._experts_implementation = "eager"  # which takes one expert of a layer's tensor at a time
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    base = model.base_model
    if hasattr(base, "rotary_emb"):  # its frequencies are computed, not stored
        base.rotary_emb = type(base.rotary_emb)(config)
    layers = base.h if config.model_type == "gpt2" else base.layers
    prefix = next(name for name, module in model.named_modules() if module is layers) + "."
    weights = HuggingFaceWeights(folder, config.model_type)
    for old, new in _RENAMED:
        weights.tensors = {name.replace(old, new): t for name, t in weights.tensors.items()}
    stored = set(weights.tensors)
    if config.model_type in OF_EXPERTS:
        for number, layer in enumerate(layers):
            _replace_experts(layer.mlp.experts, f"{prefix}{number}.mlp.experts.", stored, weights)
    _require_all(model, stored, weights)
    outside = [name for name in stored if not name.startswith(prefix)]
    model.load_state_dict(_read(weights, outside), strict=False, assign=True)
    model.tie_weights()
    for number, layer in enumerate(layers):
        start = f"{prefix}{number}."
        inside = [name for name in stored if name.startswith(start)]
        read_when_run(layer, partial(_read, weights, inside, start))
    return model


class _Experts:
    """A layer's experts in the place of their one tensor, each read when it is asked for."""

    def __init__(self, weights: HuggingFaceWeights, names: list[list[str]]) -> None:
        self._weights, self._names = weights, names

    def __getitem__(self, expert: Tensor) -> Tensor:
        return torch.cat([self._weights.read(name).float() for name in self._names[int(expert)]])


def _replace_experts(
    experts: Any, prefix: str, stored: set[str], weights: HuggingFaceWeights
) -> None:
    """Let a layer's experts be read one by one; their matrices are no longer among `stored`."""
    for attribute, parts in _OF_EXPERT.items():
        names = []
        for expert in range(getattr(experts, attribute).shape[0]):
            wanted = [f"{prefix}{expert}.{part}.weight" for part in parts]
            if missing := [name for name in wanted if name not in stored]:
                raise ConversionError(f"the folder lacks the tensor {missing[0]}")
            stored.difference_update(wanted)
            names.append(wanted)
        delattr(experts, attribute)
        setattr(experts, attribute, _Experts(weights, names))


def _require_all(model: Any, stored: set[str], weights: HuggingFaceWeights) -> None:
    for name, parameter in model.named_parameters():
        if name not in stored:
            raise ConversionError(f"the folder lacks the tensor {name}")
        shape = weights.tensors[name].shape
        if shape != tuple(parameter.shape):
            raise ConversionError(
                f"the weights do not fit config.json: expected {name} of shape "
                f"{list(parameter.shape)}, got {list(shape)}"
            )
    if unknown := sorted(stored - model.state_dict().keys()):
        raise ConversionError(f"config.json describes no {', '.join(unknown[:4])}")


def _read(weights: HuggingFaceWeights, names: list[str], prefix: str = "") -> dict[str, Tensor]:
    return {name.removeprefix(prefix): weights.read(name).float() for name in names}


def network_of(checkpoint: MegatronCheckpoint, tokenizer: Path, dtype: torch.dtype) -> Any:
    """Return a checkpoint's model in evaluation mode, its vocabulary cut to the tokenizer's."""
    import transformers

    facts = read_tokenizer(tokenizer)
    model = architecture_of(checkpoint.args, facts.vocab_size)
    steps = convert_steps(checkpoint, match_names(checkpoint.tensors, model), model, dtype)
    tensors = {name: tensor.clone() for name, tensor in steps}
    config = transformers.AutoConfig.for_model(**hf_config(model, dtype, facts.ids))
    family = getattr(transformers, CLASSES[model.family])
    # Transformers puts the tensors in their place: newer versions name some of them otherwise.
    network, info = family.from_pretrained(
        None, config=config, state_dict=tensors, dtype=dtype, output_loading_info=True
    )
    if wrong := {name: keys for name, keys in info.items() if keys}:
        raise ConversionError(f"transformers could not fill the model: {wrong}")
    return network.eval()


def is_checkpoint(folder: Path) -> bool:
    """Return whether this is a `--save` folder of Megatron, or one iteration in it."""
    return any((folder / name).is_file() for name in (TRACKER, ".metadata"))


def tokenizer_of(checkpoint: MegatronCheckpoint) -> Path:
    """Return the tokenizer folder that the training arguments name."""
    named = getattr(checkpoint.args, "tokenizer_model", None)
    if not named or not (Path(named) / "tokenizer.json").is_file():
        raise ValueError(
            f"the checkpoint {checkpoint.folder} was trained with the tokenizer {named!r}, where "
            "there is no tokenizer.json now: name the tokenizer's folder"
        )
    return Path(named)


def training_tokenizer_sha256(checkpoint: MegatronCheckpoint) -> str | None:
    """Return the digest of the tokenizer that wrote the training data; None where that is gone."""
    args = checkpoint.args
    paths = getattr(args, "train_data_path", None) or getattr(args, "data_path", None) or []
    for path in map(Path, map(str, paths)):
        try:
            manifest = load_manifest(path.parent)
        except (OSError, ValueError):  # the data has moved, or another tool made it
            continue
        if path in map(manifest.prefix, manifest.domains):  # beside a weight, "0.5", is any other
            return manifest.tokenizer.sha256
    return None
