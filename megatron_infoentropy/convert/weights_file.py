"""Writing a `.safetensors` file tensor by tensor, so that a model never has to be in memory whole.

The format: 8 bytes with the length of the header, little endian; the header, JSON with every
tensor's name, dtype, shape and place; then the numbers, one tensor after the other. Shapes must be
known in advance; a stacked parameter of Megatron may then be read, cut up, written and forgotten.
"""

import json
import math
import struct
from collections.abc import Iterable
from pathlib import Path

import torch

NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}

Shape = tuple[int, ...]


def write_weights(
    path: Path,
    shapes: dict[str, Shape],
    dtype: torch.dtype,
    tensors: Iterable[tuple[str, torch.Tensor]],
) -> None:
    """Write tensors in the order of `shapes`, converted to `dtype`; the file appears when whole.

    Raises:
        ValueError: the tensors are not those announced.
    """
    unfinished = path.with_name(path.name + ".part")
    with unfinished.open("wb") as file:
        file.write(_header(shapes, dtype))
        for (expected, shape), (name, tensor) in zip(shapes.items(), tensors, strict=True):
            if (name, tuple(tensor.shape)) != (expected, shape):
                raise ValueError(f"expected {expected} {shape}, got {name} {tuple(tensor.shape)}")
            numbers = tensor.to(dtype).contiguous().flatten().view(torch.uint8)
            file.write(numbers.numpy())
    unfinished.replace(path)


def size_of(shapes: dict[str, Shape], dtype: torch.dtype) -> int:
    """Return how many bytes the file has."""
    numbers = sum(math.prod(shape) for shape in shapes.values()) * dtype.itemsize
    return len(_header(shapes, dtype)) + numbers


def _header(shapes: dict[str, Shape], dtype: torch.dtype) -> bytes:
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + math.prod(shape) * dtype.itemsize
        entries[name] = {
            "dtype": NAMES[dtype],
            "shape": list(shape),
            "data_offsets": [start, end],
        }
    header = json.dumps(entries, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)  # so that the numbers are aligned
    return struct.pack("<Q", len(header)) + header
