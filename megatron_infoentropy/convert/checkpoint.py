"""Reading a `torch_dist` checkpoint of Megatron in one process, without Megatron.

On disk, below the folder given to `--save`:

    latest_checkpointed_iteration.txt   "1000", or "release"
    iter_0001000/metadata.json          {"sharded_backend": "torch_dist", ...}
    iter_0001000/.metadata              pickle: every tensor's shape, dtype and pieces
    iter_0001000/__0_0.distcp ...       the pieces; which rank wrote them no longer matters
    iter_0001000/common.pt              the training arguments, before Megatron-Core 0.19; since
                                        then they are an entry of the .distcp files

PyTorch's own reader joins the pieces of a tensor, whatever the parallel layout was. What is not
numbers is read by `unpickle`, which cannot run code.
"""

import argparse
import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.distributed.checkpoint import filesystem, metadata
from torch.distributed.checkpoint.state_dict_loader import load

from megatron_infoentropy.convert.unpickle import unpickle, unpickle_torch_file

_LATEST = "latest_checkpointed_iteration.txt"
_RENAMED = {  # training arguments of Megatron-Core before 0.19: their names now
    "norm_epsilon": "layernorm_epsilon",
    "apply_layernorm_1p": "layernorm_zero_centered_gamma",
}
_NOT_PARAMETERS = ("optimizer.", "chained_", "rng_state", "rerun_state_machine_state", "common_")

_METADATA_CLASSES: dict[tuple[str, str], Any] = {
    **{
        (metadata.__name__, name): getattr(metadata, name)
        for name in (*metadata.__all__, "_MEM_FORMAT_ENCODING")
    },
    (filesystem.__name__, "_StorageInfo"): filesystem._StorageInfo,
    ("torch", "Size"): torch.Size,
    # A lookup in a table of layouts ("torch.strided"): no code of the pickle's choosing.
    ("torch.serialization", "_get_layout"): torch.serialization._get_layout,
    **{
        ("torch", name): value
        for name, value in vars(torch).items()
        if isinstance(value, torch.dtype)
    },
}


class StoredTensor(NamedTuple):
    """Shape and dtype of a parameter as a whole, all ranks' pieces together."""

    shape: tuple[int, ...]
    dtype: torch.dtype


class MegatronCheckpoint:
    """One iteration of a checkpoint.

    Args:
        checkpoint: the folder given to `--save`, or one `iter_...` folder in it.
        iteration: which iteration of a `--save` folder; by default the latest.

    Raises:
        ValueError: nothing there that could be read, naming what was looked for.
    """

    folder: Path
    iteration: int
    args: argparse.Namespace  # the training arguments; unknown classes are stand-ins
    tensors: dict[str, StoredTensor]  # the parameters, by Megatron's names

    def __init__(self, checkpoint: Path, iteration: int | None = None) -> None:
        self.folder = find_iteration(checkpoint, iteration)
        _require_torch_dist(self.folder)
        self._reader = _Reader(self.folder)
        self.tensors = dict(self._parameters())
        state = self._common_state()
        self.args = state["args"]
        for old, new in _RENAMED.items():
            if hasattr(self.args, old) and not hasattr(self.args, new):
                setattr(self.args, new, getattr(self.args, old))
        self.iteration = state["iteration"]

    def read(self, name: str) -> torch.Tensor:
        """Return one parameter, joined from its pieces, in the dtype it was saved in."""
        shape, dtype = self.tensors[name]
        tensor = torch.empty(shape, dtype=dtype)
        with warnings.catch_warnings():
            # It says that there is one process, which is what no_dist asks for.
            warnings.simplefilter("ignore", UserWarning)
            load({name: tensor}, storage_reader=self._reader, no_dist=True)
        return tensor

    def _parameters(self) -> Iterator[tuple[str, StoredTensor]]:
        for name, entry in self._reader.metadata.state_dict_metadata.items():
            other = name.startswith(_NOT_PARAMETERS) or "._extra_state" in name
            if isinstance(entry, metadata.TensorStorageMetadata) and not other:
                yield name, StoredTensor(tuple(entry.size), entry.properties.dtype)

    def _common_state(self) -> dict[str, Any]:
        legacy = self.folder / "common.pt"
        data = legacy.read_bytes() if legacy.is_file() else self._reader.read_entry("common_state/")
        state = None if data is None else unpickle_torch_file(data)
        if isinstance(state, list) and len(state) == 1:
            (state,) = state
        if not isinstance(state, dict) or not isinstance(state.get("args"), argparse.Namespace):
            raise ValueError(
                f"{self.folder} holds no training arguments, from which the model's configuration "
                "is made; expected them as common.pt or as the entry common_state"
            )
        return state


class _Reader(filesystem.FileSystemReader):
    """PyTorch's reader, with an index that is read once and cannot run code."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.folder = folder
        self.metadata: metadata.Metadata = unpickle(
            (folder / ".metadata").read_bytes(), _METADATA_CLASSES
        )
        if not isinstance(self.metadata, metadata.Metadata):
            raise ValueError(f"{folder / '.metadata'} is not the index of a checkpoint")

    def read_metadata(self, *_: Any, **__: Any) -> metadata.Metadata:
        return self.metadata

    def read_entry(self, prefix: str) -> bytes | None:
        """Return the bytes of the first entry whose name starts so, or None."""
        places: dict[metadata.MetadataIndex, Any] = self.metadata.storage_data or {}
        for index, place in places.items():
            if index.fqn.startswith(prefix):
                with (self.folder / place.relative_path).open("rb") as file:
                    file.seek(place.offset)
                    data: bytes = file.read(place.length)
                    return data
        return None


def find_iteration(checkpoint: Path, iteration: int | None) -> Path:
    """Return the folder of one iteration below a `--save` folder (or the folder itself).

    Raises:
        ValueError: there is no such folder, or the wrong one was named with an iteration.
    """
    if (checkpoint / ".metadata").is_file() and iteration is None:
        return checkpoint
    if iteration is not None:
        return _require_folder(checkpoint / f"iter_{iteration:07d}")
    latest = checkpoint / _LATEST
    if not latest.is_file():
        raise ValueError(
            f"expected {checkpoint} to be a Megatron checkpoint: the folder given to --save, with "
            f"{_LATEST}, or an iter_... folder, with .metadata; found neither"
        )
    name = latest.read_text().strip()
    return _require_folder(checkpoint / (f"iter_{int(name):07d}" if name.isdigit() else name))


def _require_folder(folder: Path) -> Path:
    if folder.is_dir():
        return folder
    found = sorted(path.name for path in folder.parent.glob("iter_*"))
    raise ValueError(f"expected the checkpoint {folder}; its parent has {found or 'none'}")


def _require_torch_dist(folder: Path) -> None:
    path = folder / "metadata.json"
    backend = json.loads(path.read_text()).get("sharded_backend") if path.is_file() else None
    if backend != "torch_dist" or not (folder / ".metadata").is_file():
        raise ValueError(
            f"expected {folder} to be of the format torch_dist, got {backend or 'no metadata.json'}"
            "; save it from Megatron with --ckpt-format torch_dist"
        )
