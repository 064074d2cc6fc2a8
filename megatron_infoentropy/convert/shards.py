"""Which tensors go into which `.safetensors` file, and the index that says so."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from megatron_infoentropy.convert.architecture import Architecture
from megatron_infoentropy.convert.checkpoint import MegatronCheckpoint
from megatron_infoentropy.convert.errors import InvalidWeightsError
from megatron_infoentropy.convert.layout import LAYOUTS
from megatron_infoentropy.convert.matching import Source, Step, require_shape, steps_of
from megatron_infoentropy.convert.weights_file import Shape, size_of

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
