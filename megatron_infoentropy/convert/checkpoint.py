"""A Megatron checkpoint: which iteration, its training arguments, its parameters; no Megatron.

On disk, below the folder given to `--save`:

    latest_checkpointed_iteration.txt   "1000", or "release"
    iter_0001000/.metadata, *.distcp    PyTorch's distributed checkpoint format: see `distcp`
    iter_0001000/metadata.json          {"sharded_backend": "torch_dist", ...}; with the format
                                        fsdp_dtensor there is none
    iter_0001000/common.pt              the training arguments, before Megatron-Core 0.19; since
                                        then the entry common_state; with fsdp_dtensor the entry
                                        args

What is not numbers is read by `unpickle`, which cannot run code.
"""

import argparse
import json
import re
from pathlib import Path
from typing import Any

import torch

from megatron_infoentropy.checkpoints import (
    TRACKER,
    find_damage,
    has_manifest,
    path_of,
    read_tracker,
)
from megatron_infoentropy.convert.distcp import DistcpReader
from megatron_infoentropy.convert.errors import ConversionError
from megatron_infoentropy.convert.unpickle import load_object


def read_object(path: Path) -> dict[str, Any]:
    """Return the object in a file; an empty one where there is no file."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ConversionError(f"{path} is no JSON: {error}; copy it again") from None
    if not isinstance(content, dict):
        raise ConversionError(f"expected a JSON object in {path}, got {content!r:.40}")
    return content


_RENAMED = {  # training arguments of Megatron-Core before 0.19: their names now
    "norm_epsilon": "layernorm_epsilon",
    "apply_layernorm_1p": "layernorm_zero_centered_gamma",
    "hybrid_override_pattern": "hybrid_layer_pattern",
}
_NOT_PARAMETERS = re.compile(
    r"(optimizer|chained_|rng_state|rerun_state|common_|opt_param_scheduler)|.*\._extra_state"
)
_WRAPPERS = re.compile(r"(?:(?:model|module)\.)+")  # around the model with fsdp_dtensor


class MegatronCheckpoint:
    """One iteration of a checkpoint.

    Args:
        checkpoint: the folder given to `--save`, or one `iter_...` folder in it.
        iteration: which iteration of a `--save` folder; by default the latest.
        checksums: compare all files with the manifest that our trainer writes, if there is one;
            otherwise only their sizes.
        rope_scaling_factor: the one that the model was trained with, where its trainer does not
            say.

    Raises:
        ConversionError: nothing there that could be read, or a file is missing, cut off, or not as
            its manifest says.
    """

    folder: Path
    iteration: int
    args: argparse.Namespace  # the training arguments; unknown classes are stand-ins
    tensors: dict[str, torch.Tensor]  # the parameters, by Megatron's names, without their numbers

    def __init__(
        self,
        checkpoint: Path,
        iteration: int | None = None,
        *,
        checksums: bool = False,
        rope_scaling_factor: float | None = None,
    ) -> None:
        self.folder = find_iteration(checkpoint, iteration)
        _require_undamaged(self.folder, checksums)
        _require_known_format(self.folder)
        self._reader = DistcpReader(self.folder)
        self._stored = {  # the parameters: the names that they are stored under
            _WRAPPERS.sub("", name, count=1): name
            for name in self._reader.tensors
            if not _NOT_PARAMETERS.match(name)
        }
        self.tensors = {name: self._reader.tensors[at] for name, at in self._stored.items()}
        self._reader.require_complete(self._stored.values())
        self.args, self.iteration = self._arguments()
        for old, new in _RENAMED.items():
            if hasattr(self.args, old) and not hasattr(self.args, new):
                setattr(self.args, new, getattr(self.args, old))
        if rope_scaling_factor is not None:
            self.args.rope_scaling_factor = rope_scaling_factor
            self.args.infoentropy_rope_scaling_factor = rope_scaling_factor

    def read(self, name: str, index: tuple[int, ...] = ()) -> torch.Tensor:
        """Return one parameter, joined from its pieces, in the dtype it was saved in.

        Of a stacked one `index` says which, along its first axes.
        """
        return self._reader.read(self._stored[name], index)

    def _arguments(self) -> tuple[argparse.Namespace, int]:
        legacy = self.folder / "common.pt"
        state: Any
        objects = self._reader.objects
        if "args" in objects:
            names = [name for name in ("args", "iteration") if name in objects]
            state = {name: self._reader.read_object(name) for name in names}
        elif legacy.is_file():
            with legacy.open("rb") as file:
                state = load_object(file, str(legacy))
        else:
            name = next((name for name in objects if name.startswith("common_state/")), None)
            state = None if name is None else self._reader.read_object(name)
        if isinstance(state, list) and len(state) == 1:
            (state,) = state
        if not isinstance(state, dict) or not isinstance(state.get("args"), argparse.Namespace):
            raise ConversionError(
                f"{self.folder} holds no training arguments, from which the model's configuration "
                "is made; expected them as common.pt, or as the entry common_state or args"
            )
        return state["args"], int(state.get("iteration") or 0)


def find_iteration(checkpoint: Path, iteration: int | None) -> Path:
    """Return the folder of one iteration below a `--save` folder (or the folder itself)."""
    if (checkpoint / ".metadata").is_file() and iteration is None:
        return checkpoint
    name = read_tracker(checkpoint) if iteration is None else str(iteration)
    if name is None:
        raise ConversionError(
            f"expected {checkpoint} to be a Megatron checkpoint: the folder given to --save, with "
            f"{TRACKER}, or an iter_... folder, with .metadata; got neither"
        )
    if not name:
        raise ConversionError(
            f"{checkpoint / TRACKER} is empty or damaged: name the iteration (--iteration)"
        )
    folder = path_of(checkpoint, name)
    if not folder.is_dir():
        there = ", ".join(sorted(path.name for path in checkpoint.glob("iter_*"))) or "none"
        raise ConversionError(f"expected the checkpoint {folder}; in {checkpoint} is {there}")
    return folder


def _require_undamaged(folder: Path, checksums: bool) -> None:
    damage = find_damage(folder, checksums=checksums) if has_manifest(folder) else ""
    if damage:
        raise ConversionError(f"{damage}: copy it again, or take another iteration")


def _require_known_format(folder: Path) -> None:
    backend = read_object(folder / "metadata.json").get("sharded_backend")
    if backend not in (None, "torch_dist", "fsdp_dtensor") or not (folder / ".metadata").is_file():
        legacy = "torch, one file a rank" if list(folder.glob("mp_rank_*")) else "no .metadata"
        raise ConversionError(
            f"expected {folder} to be of the format torch_dist or fsdp_dtensor, got "
            f"{backend or legacy}; save it from Megatron with --ckpt-format torch_dist"
        )
