"""A Megatron checkpoint, written under any parallel layout, as a Hugging Face folder.

1. Read the index and the training arguments; find the family that computes the same, or refuse.
2. Match every parameter's name and shape with the table; look for missing files and for space.
3. Only now write, layer by layer and file by file, into a hidden folder; rename it at the end.
"""

import json
import math
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from safetensors.torch import save_file

from megatron_infoentropy.convert.architecture import Architecture, architecture_of, as_family
from megatron_infoentropy.convert.checkpoint import MegatronCheckpoint
from megatron_infoentropy.convert.errors import ConversionError
from megatron_infoentropy.convert.hf_config import hf_config, name_of
from megatron_infoentropy.convert.hf_weights import DTYPES, INDEX, common_dtype
from megatron_infoentropy.convert.layout import LAYOUTS
from megatron_infoentropy.convert.model_card import model_card
from megatron_infoentropy.convert.naming import ConversionStep, hf_shapes, match_names
from megatron_infoentropy.convert.tokenizer import (
    class_to_name,
    copy_tokenizer,
    cuts_as_qwen2,
    read_tokenizer,
)
from megatron_infoentropy.files import new_folder, require_free, require_space
from megatron_infoentropy.progress import progress

SHARD_BYTES = 1_000_000_000
"""How large a file of weights is at most, by default; one is in memory at a time."""
CONFIG = "config.json"
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
_DTYPES = {name_of(dtype): dtype for dtype in DTYPES.values()}
_FILES = (  # of an export: what --overwrite may replace
    *("*.json", "*.safetensors", "README.md", "*.jinja", "*.model", "*.txt"),
    "additional_chat_templates",
)


Check = Callable[[MegatronCheckpoint, Path], None]
"""Called with a checkpoint and a Hugging Face folder, of which one was made of the other."""


@dataclass(frozen=True)
class ConversionSummary:
    """The facts of a finished conversion, in either direction."""

    output: Path
    family: str
    parameters: int
    dtype: str
    vocab_size: int
    not_qwen2: str = ""  # why a model with --add-qkv-bias became Llama by itself
    flags: dict[str, Any] = field(default_factory=dict)  # of an import, names without dashes


def convert_checkpoint(
    checkpoint: Path,
    output: Path,
    *,
    tokenizer: Path | None = None,
    family: str = "auto",
    dtype: Dtype = "auto",
    iteration: int | None = None,
    overwrite: bool = False,
    shard_bytes: int = SHARD_BYTES,
    checksums: bool = True,
    rope_scaling_factor: float | None = None,
    check: Check = lambda checkpoint, folder: None,
) -> ConversionSummary:
    """Write the model of a Megatron checkpoint as a Hugging Face folder.

    Args:
        checkpoint: the folder given to `--save`, or one of its `iter_...` folders.
        output: the folder to make.
        tokenizer: a Hugging Face tokenizer folder; its files are copied, and its size is where the
            padded vocabulary is cut. Without it, that is the training argument vocab_size.
        family: "qwen2" or "llama", which both compute a model trained with --add-qkv-bias; "auto"
            is Qwen2 unless its heads or the tokenizer are such as Qwen2 has not.
        dtype: of the exported weights; "auto" keeps that of the checkpoint.
        iteration: which iteration of a `--save` folder; by default the latest.
        overwrite: replace an existing output.
        shard_bytes: how large a file of weights may be.
        checksums: read the whole checkpoint first, to compare it with its manifest if it has one.
        rope_scaling_factor: the one that the model was trained with, where its trainer does not
            say.
        check: called with both sides before the folder gets its name; if it raises, it never does.

    Raises:
        ConversionError: the checkpoint cannot be read, no family of transformers could compute the
            model, or its weights hold NaN or infinity.
        ValueError: a tokenizer that does not fit, too little space, or an existing output.
    """
    require_place(output, _FILES, overwrite=overwrite, source=checkpoint)
    _require_known(dtype)
    opened = MegatronCheckpoint(
        checkpoint, iteration, checksums=checksums, rope_scaling_factor=rope_scaling_factor
    )
    facts = None if tokenizer is None else read_tokenizer(tokenizer)
    model = architecture_of(opened.args, None if facts is None else facts.vocab_size)
    model, not_qwen2 = _choose_family(model, family, tokenizer)
    named = None if tokenizer is None else class_to_name(tokenizer, model.family)
    steps = match_names(opened.tensors, model)
    torch_dtype = _choose_dtype(dtype, opened)
    numbers = {step: sum(map(math.prod, hf_shapes(step.row, model))) for step in steps}
    parameters = sum(numbers.values())
    require_space(output, parameters * torch_dtype.itemsize)
    with new_folder(output, replaceable=_FILES, overwrite=overwrite) as folder:
        config = hf_config(model, torch_dtype, facts.ids if facts else {})
        _write_json(folder / CONFIG, config)
        _write_weights(folder, numbers, opened, model, torch_dtype, shard_bytes)
        _write_json(folder / "generation_config.json", facts.generation if facts else {})
        (folder / "README.md").write_text(model_card(opened, model, parameters), encoding="utf-8")
        if facts is not None:
            copy_tokenizer(facts, folder, named)
        check(opened, folder)
    return ConversionSummary(
        *(output, model.family, parameters, name_of(torch_dtype), model.vocab_size),
        not_qwen2=not_qwen2,
    )


def why_not_exported(checkpoint: Path) -> str | None:
    """Say why `convert_checkpoint` would refuse the model, whatever the tokenizer; None if not."""
    try:
        opened = MegatronCheckpoint(checkpoint)
        match_names(opened.tensors, architecture_of(opened.args, None))
    except ValueError as error:
        return str(error)
    return None


def _choose_family(
    model: Architecture, family: str, tokenizer: Path | None
) -> tuple[Architecture, str]:
    """Return the model as a family, and why this is not Qwen2 where it could have been."""
    if family != "auto":
        return as_family(model, family), ""
    if model.zero_proj_bias:
        return model, "its heads are not hidden_size / num_attention_heads wide"
    if model.family == "qwen2" and tokenizer is not None and not cuts_as_qwen2(tokenizer):
        why = "transformers 5 cuts text by Qwen2's rules in its folders, this tokenizer by others"
        return as_family(model, "llama"), why
    return model, ""


def require_place(
    output: Path, replaceable: tuple[str, ...], *, overwrite: bool, source: Path
) -> None:
    """Look whether a folder may be made there, before anything is read."""
    if source.resolve().is_relative_to(output.resolve()):
        raise ValueError(f"{output} would take the place of {source}; name another output")
    require_free(output, replaceable, overwrite)


def _require_known(dtype: str) -> None:
    if dtype not in ("auto", *_DTYPES):
        raise ValueError(f"expected a dtype of auto, {', '.join(_DTYPES)}; got {dtype!r}")


def _choose_dtype(dtype: Dtype, checkpoint: MegatronCheckpoint) -> torch.dtype:
    for name, tensor in checkpoint.tensors.items():
        if tensor.dtype not in DTYPES.values():
            raise ConversionError(
                f"expected parameters in fp32, bf16 or fp16, got {name} in {tensor.dtype}; save "
                "the model in a floating-point type without quantisation"
            )
    return common_dtype(checkpoint.tensors.values()) if dtype == "auto" else _DTYPES[dtype]


def _write_weights(
    folder: Path,
    numbers: dict[ConversionStep, int],
    checkpoint: MegatronCheckpoint,
    model: Architecture,
    dtype: torch.dtype,
    limit: int,
) -> None:
    """Write files of at most `limit` bytes, or one step's where that is more."""
    steps_by_name = {str(step): step for step in numbers}
    split = split_state_dict_into_shards_factory(
        {str(step): count * dtype.itemsize for step, count in numbers.items()},
        get_storage_size=lambda size: size,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=limit,
    )
    weight_map: dict[str, str] = {}
    total = sum(numbers.values()) * dtype.itemsize
    with progress("export", total, "bytes") as advance:
        for file, names in split.filename_to_tensors.items():
            tensors = {}  # and those of the file before are gone
            steps = [steps_by_name[name] for name in names]
            for name, tensor in convert_steps(checkpoint, steps, model, dtype):
                tensors[name] = tensor.contiguous()
                advance(tensor.nbytes)
            save_file(tensors, folder / file, {"format": "pt"})
            shutil.copymode(folder / CONFIG, folder / file)  # safetensors leaves it to its owner
            weight_map |= dict.fromkeys(tensors, file)
    if split.is_sharded:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        _write_json(folder / INDEX, index)


def convert_steps(
    checkpoint: MegatronCheckpoint,
    steps: Iterable[ConversionStep],
    model: Architecture,
    dtype: torch.dtype,
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (name, tensor) of the family in a dtype, reading one step's numbers at a time."""
    for step in steps:
        stored = checkpoint.read(step.name, step.part)
        made = LAYOUTS[step.row.layout].to_hf(stored, model)
        for name, tensor in zip(step.hf, made, strict=True):
            yield name, _rounded(str(step), tensor, dtype)


def _rounded(where: str, tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Convert to the dtype that is written, and look at what that gives."""
    rounded = tensor.to(dtype)
    if not _is_finite(rounded):
        require_finite(where, tensor)
        largest = tensor.abs().max().item()
        raise ConversionError(
            f"{where} holds numbers up to {largest:.6g}, and {name_of(dtype)} ends at "
            f"{torch.finfo(dtype).max:.6g}: convert it to a dtype with larger ones (--dtype "
            "bfloat16 or float32)"
        )
    return rounded


def _is_finite(tensor: torch.Tensor) -> bool:
    """Look at the extremes, where NaN and infinity show: it is the quickest way."""
    return not tensor.numel() or all(torch.isfinite(extreme) for extreme in torch.aminmax(tensor))


def require_finite(where: str, tensor: torch.Tensor) -> None:
    """Refuse NaN and infinity, naming the tensor and how many there are."""
    if _is_finite(tensor):
        return
    bad = int((~torch.isfinite(tensor)).sum())
    raise ConversionError(
        f"{where} holds {bad} numbers that are NaN or infinite, of {tensor.numel()}: the training "
        "had diverged when this was saved; take an earlier iteration"
    )


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
