"""Parts of the inputs for independent jobs: neighbouring files, about equally many bytes.

Shard i of n gets the same files in every job, and the shards joined in order are the whole.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path


def shard_inputs(inputs: Sequence[Path], shard: tuple[int, int]) -> list[Path]:
    """The inputs of shard (i, n), i from 0; may be none where one file is larger than a part.

    Raises:
        ValueError: i is not in 0..n-1, or there are fewer files than shards.
    """
    index, number = shard
    if not 0 <= index < number:
        raise ValueError(f"--shard i/n needs i in 0..n-1, got {index}/{number}")
    if number > len(inputs):
        raise ValueError(
            f"input files are not split: {len(inputs)} of them can not make {number} shards; "
            "ask for fewer, or give the text as more files"
        )
    sizes = [path.stat().st_size for path in inputs]
    total = max(sum(sizes), 1)
    chosen, before = [], 0
    for path, size in zip(inputs, sizes, strict=True):
        middle = 2 * before + size  # in half bytes, so that all jobs agree exactly
        if min(middle * number // (2 * total), number - 1) == index:
            chosen.append(path)
        before += size
    return chosen


def shards_digest(inputs: Sequence[Path]) -> str:
    """Return a digest of the list that is shared out: which shard has which file depends on it."""
    listed = [(path.name, path.stat().st_size) for path in inputs]
    return hashlib.sha256(json.dumps(listed).encode()).hexdigest()


def shard_name(shard: tuple[int, int]) -> str:
    """The folder of one shard; names sort in order."""
    return f"shard-{shard[0]:05d}-of-{shard[1]:05d}"


def parse_shard(text: str) -> tuple[int, int]:
    """`3/10` to (3, 10).

    Raises:
        ValueError: it is not two numbers with a slash between.
    """
    index, slash, number = text.partition("/")
    if not (slash and index.isascii() and index.isdigit() and number.isdigit()):
        raise ValueError(f"--shard must be i/n with i in 0..n-1, such as 0/10, got {text!r}")
    return int(index), int(number)
