"""What a loss sends between ranks, counted at PyTorch's dispatcher while it runs."""

from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode

# operator -> position of what this rank contributes; each counted once however it is spelled
_CONTRIBUTED = {
    "c10d::allreduce_": 0,
    "c10d::allreduce_coalesced_": 0,
    "c10d::allgather_": 1,
    "c10d::_allgather_base_": 1,
    "c10d::reduce_scatter_": 1,
    "c10d::_reduce_scatter_base_": 1,
    "c10d::alltoall_base_": 1,
    "c10d::broadcast_": 0,
    "_c10d_functional::all_reduce": 0,
    "_c10d_functional::all_reduce_": 0,
    "_c10d_functional::all_gather_into_tensor": 0,
    "_c10d_functional::all_gather_into_tensor_out": 0,
    "_c10d_functional::reduce_scatter_tensor": 0,
}


class Traffic(NamedTuple):
    """Collectives, and the bytes that this rank contributed to them."""

    collectives: int
    bytes: int


class CountCollectives(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts every collective called inside the block, also by backward passes."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.traffic = Traffic(0, 0)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        position = _CONTRIBUTED.get(func._schema.name)
        if position is not None:
            count, size = self.traffic
            self.traffic = Traffic(count + 1, size + _bytes(args[position]))
        return func(*args, **(kwargs or {}))


def _bytes(tensors: Any) -> int:
    if isinstance(tensors, torch.Tensor):
        return tensors.numel() * tensors.element_size()
    return sum(_bytes(tensor) for tensor in tensors)
