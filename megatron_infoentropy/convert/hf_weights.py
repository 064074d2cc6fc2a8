"""The weights of a Hugging Face folder, read tensor by tensor: one `.safetensors` file or many."""

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open

from megatron_infoentropy.convert.errors import ConversionError

INDEX = "model.safetensors.index.json"
WHOLE = "model.safetensors"
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_BUFFERS = (".attn.bias", ".attn.masked_bias", ".attention.bias", "inv_freq", ".masked_bias")
_PREFIXES = {"gpt2": "transformer.", "gpt_neox": "gpt_neox."}  # absent in some old exports
HEADS = ("lm_head.weight", "embed_out.weight")


class Stored(NamedTuple):
    """A tensor on disk, and its name there."""

    path: Path
    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]


class HuggingFaceWeights:
    """What parameters a folder holds, and their numbers on request; old buffers are left out.

    They have the names of transformers' model, where `model_type` says which: some old files lack
    a prefix.

    Raises:
        ConversionError: a safetensors file or a tensor is missing or damaged, or of another dtype
            than fp32, bf16 or fp16.
    """

    tensors: dict[str, Stored]

    def __init__(self, folder: Path, model_type: str = "") -> None:
        prefix = _PREFIXES.get(model_type, "")
        self.tensors = {
            name if name.startswith((prefix, *HEADS)) else prefix + name: tensor
            for name, tensor in _read_headers(folder).items()
        }

    @property
    def dtype(self) -> torch.dtype:
        """That of all of them, or fp32 where they differ; config.json may say another, or none."""
        return common_dtype(self.tensors.values())

    @property
    def parameters(self) -> int:
        return sum(math.prod(tensor.shape) for tensor in self.tensors.values())

    def read(self, name: str) -> torch.Tensor:
        """Return one tensor in the dtype it was saved in; its numbers are read when they are used.

        The file is opened for each: what was read of it counts as used memory until it is closed.
        """
        with safe_open(self.tensors[name].path, framework="pt") as file:
            tensor: torch.Tensor = file.get_tensor(self.tensors[name].name)
        return tensor

    def equal(self, one: str, other: str) -> bool:
        """Say whether two tensors hold the same numbers; those of one dtype are not copied."""
        first, second = self.read(one), self.read(other)
        if first.dtype != second.dtype:
            first, second = first.float(), second.float()
        return torch.equal(first, second)


def common_dtype(tensors: Iterable[Stored | torch.Tensor]) -> torch.dtype:
    """Return the dtype of all of these tensors, or fp32 where they differ."""
    dtypes = {tensor.dtype for tensor in tensors}
    return dtypes.pop() if len(dtypes) == 1 else torch.float32


def _read_headers(folder: Path) -> dict[str, Stored]:
    wanted = _weight_map(folder)
    if wanted is None:
        return _read_header(folder / WHOLE)
    tensors: dict[str, Stored] = {}
    for file in sorted(set(wanted.values())):
        stored = _read_header(folder / file)
        said = {name for name, place in wanted.items() if place == file}
        if other := min(said ^ stored.keys(), default=None):  # transformers reads all there is
            does, does_not = ("says", "does not") if other in said else ("does not say", "does")
            raise ConversionError(
                f"{folder / INDEX} {does} that {file} holds {other}, and it {does_not}: the "
                "folder mixes two exports; copy it again"
            )
        tensors |= stored
    return tensors


def _weight_map(folder: Path) -> dict[str, str] | None:
    """{tensor: file} of the index; None where there is one file without an index."""
    if (folder / INDEX).is_file():
        wanted = _read_index(folder / INDEX)
        if (folder / WHOLE).is_file() and set(wanted.values()) != {WHOLE}:
            raise ConversionError(
                f"{folder} holds {WHOLE}, which transformers would read, and {INDEX}, which names "
                "other files: one of them is of an earlier export; remove that"
            )
        return wanted
    if not (folder / WHOLE).is_file():
        other = [path.name for path in folder.glob("*.bin")]
        raise ConversionError(
            f"expected {WHOLE} or {INDEX} in {folder}, got {other or 'no weights'}; .bin files "
            "are pickles: load the model with transformers and save it again as safetensors"
        )
    return None


def _read_index(path: Path) -> dict[str, str]:
    try:
        files: dict[str, str] = json.loads(path.read_bytes())["weight_map"]
        for file in files.values():
            if file in ("", ".", "..") or "/" in file or "\0" in file:
                raise ValueError(f"{file!r} is no name of a file in this folder")
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise ConversionError(f"{path} is no index of weights: {error}") from None
    return {name: file for name, file in files.items() if not name.endswith(_BUFFERS)}


def _read_header(path: Path) -> dict[str, Stored]:
    if not path.is_file():
        raise ConversionError(f"{path} is missing; the index names it; copy it again")
    tensors = {}
    try:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118  it is no dict
                if name.endswith(_BUFFERS):
                    continue
                header = file.get_slice(name)
                if header.get_dtype() not in DTYPES:
                    raise ConversionError(
                        f"expected weights in {', '.join(DTYPES)}, got {name} in "
                        f"{header.get_dtype()}; take the model before it was quantised"
                    )
                dtype, shape = DTYPES[header.get_dtype()], tuple(header.get_shape())
                tensors[name] = Stored(path, name, dtype, shape)
    except (SafetensorError, OSError) as error:
        raise ConversionError(
            f"{path} is no safetensors file, or one that is damaged or was cut off ({error}); copy "
            "it again"
        ) from None
    return tensors
