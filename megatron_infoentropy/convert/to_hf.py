"""A Megatron checkpoint, written under any parallel layout, as a Hugging Face folder.

1. Read the index and the training arguments; find the family that computes the same, or refuse.
2. Match every parameter's name and shape with the table; look for missing files and for space.
3. Only now write, layer by layer and file by file, into a hidden folder; rename it at the end.
"""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from megatron_infoentropy.convert.architecture import Architecture, architecture_of, as_family
from megatron_infoentropy.convert.checkpoint import MegatronCheckpoint
from megatron_infoentropy.convert.errors import UnsupportedModelError
from megatron_infoentropy.convert.hf_config import hf_config
from megatron_infoentropy.convert.matching import match_names
from megatron_infoentropy.convert.model_card import model_card
from megatron_infoentropy.convert.output_folder import (
    files_stand,
    new_folder,
    require_place,
    require_space,
)
from megatron_infoentropy.convert.shards import (
    INDEX,
    SHARD_BYTES,
    Shard,
    convert_steps,
    index_of,
    plan_shards,
)
from megatron_infoentropy.convert.tokenizer_check import class_to_name, cuts_as_qwen2
from megatron_infoentropy.convert.tokenizer_files import copy_tokenizer, read_tokenizer
from megatron_infoentropy.convert.weights_file import NAMES, write_weights
from megatron_infoentropy.progress import Advance, progress

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in NAMES}


@dataclass(frozen=True)
class ConversionSummary:
    """What was written, and from what."""

    output: Path
    checkpoint: Path  # the iter_... folder
    iteration: int
    family: str
    parameters: int
    dtype: str
    files: int  # of weights
    vocab_size: int
    padded_vocab_size: int
    tied_embeddings: bool
    not_qwen2: str  # why a model with --add-qkv-bias became Llama by itself


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
    check: Callable[[Path], None] = lambda folder: None,
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
        check: called with the finished folder before it gets its name; if it raises, it never does.

    Raises:
        UnsupportedModelError: the model is none that a family of transformers could compute.
        UnreadableCheckpointError, IncompleteCheckpointError: the checkpoint cannot be read.
        InvalidWeightsError: NaN or infinity in the weights.
        ValueError: a tokenizer that does not fit, too little space, or an existing output.
    """
    require_place(output, overwrite=overwrite, source=checkpoint)
    _require_known(dtype)
    opened = MegatronCheckpoint(
        checkpoint, iteration, checksums=checksums, rope_scaling_factor=rope_scaling_factor
    )
    facts = None if tokenizer is None else read_tokenizer(tokenizer)
    model = architecture_of(opened.args, None if facts is None else facts.vocab_size)
    model, not_qwen2 = _choose_family(model, family, tokenizer)
    named = None if tokenizer is None else class_to_name(tokenizer, model.family)
    sources = match_names(opened.tensors, model)
    torch_dtype = _choose_dtype(dtype, opened)
    shards = plan_shards(opened, sources, model, torch_dtype, shard_bytes)
    require_space(output, sum(shard.bytes(torch_dtype) for shard in shards))
    fingerprint = _fingerprint(opened, model, torch_dtype, shard_bytes)
    with new_folder(output, fingerprint) as folder:
        _write_shards(folder, shards, opened, model, torch_dtype)
        config = hf_config(model, torch_dtype, facts.ids if facts else {})
        _write_json(folder / "config.json", config)
        _write_json(folder / "generation_config.json", facts.generation if facts else {})
        (folder / "README.md").write_text(
            model_card(opened, model, _parameters(shards)), encoding="utf-8"
        )
        if facts is not None:
            copy_tokenizer(facts, folder, named)
        check(folder)
    return _summary(output, opened, model, torch_dtype, shards, not_qwen2)


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


def _write_shards(
    folder: Path,
    shards: list[Shard],
    checkpoint: MegatronCheckpoint,
    model: Architecture,
    dtype: torch.dtype,
) -> None:
    total = sum(shard.bytes(dtype) for shard in shards)
    with progress("export", total, "bytes") as advance:
        for shard in shards:
            path = folder / shard.name
            if path.exists():  # whole, from an attempt that was interrupted
                advance(shard.bytes(dtype))
                continue
            tensors = convert_steps(checkpoint, shard.steps, model, dtype)
            write_weights(path, shard.shapes, dtype, _counted(tensors, dtype, advance))
    if len(shards) > 1:
        _write_json(folder / INDEX, index_of(shards, dtype))


def _counted(tensors: Any, dtype: torch.dtype, advance: Advance) -> Any:
    for name, tensor in tensors:
        yield name, tensor
        advance(tensor.numel() * dtype.itemsize)


def _require_known(dtype: str) -> None:
    if dtype not in ("auto", *_DTYPES):
        raise ValueError(f"expected a dtype of auto, {', '.join(_DTYPES)}; got {dtype!r}")


def _choose_dtype(dtype: Dtype, checkpoint: MegatronCheckpoint) -> torch.dtype:
    for name, tensor in checkpoint.tensors.items():
        if tensor.dtype not in NAMES:
            raise UnsupportedModelError(
                f"expected parameters in fp32, bf16 or fp16, got {name} in {tensor.dtype}; save "
                "the model in a floating-point type without quantisation"
            )
    if dtype != "auto":
        return _DTYPES[dtype]
    stored = {tensor.dtype for tensor in checkpoint.tensors.values()}
    return stored.pop() if len(stored) == 1 else torch.float32


def _fingerprint(
    checkpoint: MegatronCheckpoint, model: Architecture, dtype: torch.dtype, shard_bytes: int
) -> str:
    index = hashlib.sha256((checkpoint.folder / ".metadata").read_bytes()).hexdigest()
    files = files_stand(checkpoint.folder.glob("*.distcp"))
    return json.dumps([index, files, repr(model), str(dtype), shard_bytes])


def _parameters(shards: list[Shard]) -> int:
    return sum(torch.Size(shape).numel() for shard in shards for shape in shard.shapes.values())


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _summary(
    output: Path,
    opened: MegatronCheckpoint,
    model: Architecture,
    dtype: torch.dtype,
    shards: list[Shard],
    not_qwen2: str,
) -> ConversionSummary:
    return ConversionSummary(
        output=output,
        checkpoint=opened.folder,
        iteration=opened.iteration,
        family=model.family,
        parameters=_parameters(shards),
        dtype=str(dtype).removeprefix("torch."),
        files=len(shards),
        vocab_size=model.vocab_size,
        padded_vocab_size=model.padded_vocab_size,
        tied_embeddings=not model.untied,
        not_qwen2=not_qwen2,
    )
