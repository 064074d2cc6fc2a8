"""A Megatron checkpoint, written under any parallel layout, as a Hugging Face folder.

1. Read the index and the training arguments; find the family that computes the same, or refuse.
2. Match every parameter's name and shape with the table; look for missing files and for space.
3. Only now write, layer by layer and file by file, into a hidden folder; rename it at the end.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from megatron_infoentropy.convert.architecture import Architecture, architecture_of, as_family
from megatron_infoentropy.convert.checkpoint import MegatronCheckpoint
from megatron_infoentropy.convert.errors import InvalidWeightsError, UnsupportedModelError
from megatron_infoentropy.convert.hf_config import hf_config
from megatron_infoentropy.convert.layout import LAYOUTS
from megatron_infoentropy.convert.matching import Source, Step, match_names, require_shape, steps_of
from megatron_infoentropy.convert.model_card import model_card
from megatron_infoentropy.convert.output_folder import (
    files_stand,
    new_folder,
    require_place,
    require_space,
)
from megatron_infoentropy.convert.tokenizer import (
    class_to_name,
    copy_tokenizer,
    cuts_as_qwen2,
    read_tokenizer,
)
from megatron_infoentropy.convert.weights_file import NAMES, Shape, size_of, write_weights
from megatron_infoentropy.progress import Advance, progress

SHARD_BYTES = 2_000_000_000
INDEX = "model.safetensors.index.json"


@dataclass
class Shard:
    """One file: what is converted into it, and the tensors that this gives."""

    name: str = ""
    steps: list[Step] = field(default_factory=list)
    shapes: dict[str, Shape] = field(default_factory=dict)

    def bytes(self, dtype: torch.dtype) -> int:
        return size_of(self.shapes, dtype)


def plan_shards(
    checkpoint: MegatronCheckpoint,
    sources: Iterable[Source],
    model: Architecture,
    dtype: torch.dtype,
    limit: int,
) -> list[Shard]:
    """Cut the model into files of at most `limit` bytes, or one stored tensor where that is more.

    The layouts run on tensors without numbers (device "meta"): this finds wrong shapes, and says
    how large every tensor of the new files is, before anything is written.

    Raises:
        ValueError: a stored tensor has another shape than follows from the training arguments.
    """
    sources = list(sources)
    for source in sources:
        require_shape(source, checkpoint.tensors[source.name].shape, model)
    shards = [Shard()]
    filled = 0
    for step in steps_of(sources, model):
        shape = checkpoint.tensors[step.source.name].shape
        shape = shape[len(step.part) :]
        shapes = {
            name: tuple(part.shape)
            for name, part in _converted(step, torch.empty(shape, device="meta"), model)
        }
        size = sum(torch.Size(part).numel() for part in shapes.values()) * dtype.itemsize
        if shards[-1].steps and filled + size > limit:
            shards.append(Shard())
            filled = 0
        shards[-1].steps.append(step)
        shards[-1].shapes.update(shapes)
        filled += size
    for number, shard in enumerate(shards, 1):
        whole = len(shards) == 1
        of = "" if whole else f"-{number:05d}-of-{len(shards):05d}"
        shard.name = f"model{of}.safetensors"
    return shards


def index_of(shards: list[Shard], dtype: torch.dtype) -> dict[str, Any]:
    """Return the content of model.safetensors.index.json."""
    numbers = sum(torch.Size(shape).numel() for shard in shards for shape in shard.shapes.values())
    return {
        "metadata": {"total_size": numbers * dtype.itemsize},
        "weight_map": {name: shard.name for shard in shards for name in shard.shapes},
    }


def convert_steps(
    checkpoint: MegatronCheckpoint,
    steps: Sequence[Step],
    model: Architecture,
    dtype: torch.dtype,
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (name, tensor) of the family in a dtype, reading one step's numbers at a time.

    A tensor lasts until the next step is read.

    Raises:
        InvalidWeightsError: NaN or infinity among them, or numbers beyond the dtype's.
    """
    memory = torch.empty(max(_stored_bytes(checkpoint, step) for step in steps), dtype=torch.uint8)
    for step in steps:
        stored = checkpoint.read(step.source.name, step.part, memory)
        for name, tensor in _converted(step, stored, model):
            yield name, _rounded(str(step), tensor, dtype)


def _stored_bytes(checkpoint: MegatronCheckpoint, step: Step) -> int:
    tensor = checkpoint.tensors[step.source.name]
    return torch.Size(tensor.shape[len(step.part) :]).numel() * tensor.dtype.itemsize


def _rounded(where: str, tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Convert to the dtype that is written, and look at what that gives."""
    rounded = tensor.to(dtype)
    try:
        require_finite(where, rounded)
    except InvalidWeightsError:
        require_finite(where, tensor)
        name, largest = str(dtype).removeprefix("torch."), tensor.abs().max().item()
        raise InvalidWeightsError(
            f"{where} holds numbers up to {largest:.6g}, and {name} ends at "
            f"{torch.finfo(dtype).max:.6g}: convert it to a dtype with larger ones (--dtype "
            "bfloat16 or float32)"
        ) from None
    return rounded


def require_finite(where: str, tensor: torch.Tensor) -> None:
    """Look for NaN and infinity: both show in the extremes, which is the quickest way to see them.

    Raises:
        InvalidWeightsError: naming the tensor and how many there are.
    """
    if not tensor.numel() or all(torch.isfinite(extreme) for extreme in torch.aminmax(tensor)):
        return
    bad = int((~torch.isfinite(tensor)).sum())
    raise InvalidWeightsError(
        f"{where} holds {bad} numbers that are NaN or infinite, of {tensor.numel()}: the training "
        "had diverged when this was saved; take an earlier iteration"
    )


def _converted(
    step: Step, stored: torch.Tensor, model: Architecture
) -> Iterator[tuple[str, torch.Tensor]]:
    parts = LAYOUTS[step.source.row.layout].to_hf(stored, model)
    yield from zip(step.hf, parts, strict=True)


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
