"""Numbers from a place in a file into memory that is there."""

from pathlib import Path

import torch

from megatron_infoentropy.convert.errors import IncompleteCheckpointError


def read_numbers(path: Path, start: int, into: torch.Tensor) -> None:
    """Fill a contiguous tensor with the bytes from `start` on.

    Raises:
        IncompleteCheckpointError: the file ends before.
    """
    target = memoryview(into.flatten().view(torch.uint8).numpy())
    with path.open("rb", buffering=0) as file:
        file.seek(start)
        while len(target):  # one call reads 2 GiB at most
            count = file.readinto(target)
            if not count:
                raise IncompleteCheckpointError(f"{path} ends early; copy it again")
            target = target[count:]
