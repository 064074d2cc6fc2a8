"""How many of a recipe's layers one GPU holds, by the dry run's arithmetic:

    python tools/gpu_depth.py RECIPE GIB -- MEGATRON FLAGS

A tenth of the memory stays free for workspaces and fragments, and what Megatron's own loss takes
beside ours is counted: the logits in fp32, twice.
"""

import sys
from dataclasses import replace
from pathlib import Path

from megatron_infoentropy.launch.dry_run import dry_run
from megatron_infoentropy.launch.estimate import Shape, memory

FREE = 0.1
FP32_COPIES = 2


def takes(shape: Shape) -> int:
    """Bytes of one rank."""
    logits = shape.micro_batch_size * shape.seq_length * shape.vocab_size
    return memory(shape).total(shape) + 4 * FP32_COPIES * logits


def deepest(shape: Shape, gib: float) -> int:
    """The most layers, at most the recipe's own, that fit; 0 where none do."""
    room = (1 - FREE) * gib * 2**30
    depths = range(shape.num_layers, 0, -1)
    return next((n for n in depths if takes(replace(shape, num_layers=n)) <= room), 0)


if __name__ == "__main__":
    recipe, gib, _, *flags = sys.argv[1:]
    shape = dry_run(Path(recipe), {}, tuple(flags), ranks=1).shape
    layers = deepest(shape, float(gib))
    size = takes(replace(shape, num_layers=max(1, layers))) / 2**30
    sys.stderr.write(f"{layers} layers take {size:.1f} of {float(gib):.1f} GiB\n")
    sys.stdout.write(f"{layers}\n")
