"""Models with one layer's parameters, or one expert's, in memory at a time, in fp32.

`StoredModel` finds parameters in a checkpoint; `read_when_run` puts some into a module of PyTorch.
"""

from argparse import Namespace
from collections import defaultdict
from collections.abc import Callable
from itertools import product

import torch
from torch import Tensor, nn

from megatron_infoentropy.convert.checkpoint import MegatronCheckpoint

Place = tuple[int, ...]
"""Where parameters are: () outside the layers, (layer,), or (layer, expert)."""
Routes = dict[int, list[Tensor]]
"""The numbers of each token's experts [length, top-k]: {layer: those of each sequence}."""

_PREFIXES = ("", "decoder.layers.*.", "decoder.layers.*.mlp.experts.experts.*.")


class StoredModel:
    """A checkpoint's arguments and its parameters, rounded to `dtype` and then in fp32."""

    def __init__(self, checkpoint: MegatronCheckpoint, dtype: torch.dtype) -> None:
        self.args: Namespace = checkpoint.args
        self.routes: Routes = defaultdict(list)
        self._checkpoint, self._dtype = checkpoint, dtype

    def logits(self, tokens: Tensor, advance: Callable[[int], None]) -> Tensor:
        """Return logits [length, padded vocabulary] of token ids [length].

        `advance` is called with 1 for every layer that has been computed.
        """
        raise NotImplementedError

    def read(self, place: Place, *names: str) -> Tensor:
        """Return the parameter under the first of its names at a place that was stored.

        The format fsdp_dtensor keeps the gate's half of one apart from the other.
        """
        for name in names:
            for parts in ((name,), (name + "_w", name + "_v")):
                stored = [where for part in parts if (where := self._where(place, part))]
                if len(stored) == len(parts):
                    read = torch.cat([self._checkpoint.read(*where) for where in stored])
                    return read.to(self._dtype).float()
        raise ValueError(f"the checkpoint has no {' or '.join(names)} at {place}")

    def has(self, place: Place, name: str) -> bool:
        """Return whether a parameter was stored under this name, whole or in two halves."""
        return any(self._where(place, name + end) for end in ("", "_w"))

    def _where(self, place: Place, name: str) -> tuple[str, Place] | None:
        """Return the stored name and the index in it: layers are stacked or stored one by one."""
        for alone in product((False, True), repeat=len(place)):
            stored, index = _PREFIXES[len(place)] + name, []
            for number, is_alone in zip(place, alone, strict=True):
                stored = stored.replace("*.", f"{number}." if is_alone else "", 1)
                index += [] if is_alone else [number]
            if stored in self._checkpoint.tensors:
                return stored, tuple(index)
        return None


def read_when_run(module: nn.Module, state: Callable[[], dict[str, Tensor]]) -> None:
    """Let a module's parameters be read when it is run, and forgotten then.

    `state` gives them by their names in the module; of others, no submodule's forward may ask.
    """

    def read(module: nn.Module, _: object) -> None:
        module.load_state_dict(state(), strict=False, assign=True)

    def forget(module: nn.Module, *_: object) -> None:
        module.to_empty(device="meta")

    module.register_forward_pre_hook(read)
    module.register_forward_hook(forget)
