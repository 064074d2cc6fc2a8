"""How many of a recipe's layers one GPU holds, by the dry run's arithmetic:

    python tools/gpu_depth.py RECIPE GIB -- MEGATRON FLAGS

A tenth of the memory stays free for workspaces and fragments, and what Megatron's own loss takes
beside ours is counted: the logits in fp32, twice.
"""

import sys
from argparse import Namespace
from pathlib import Path

from megatron_infoentropy.launch.dry_run import dry_run, memory

FREE = 0.1
FP32_COPIES = 2


def takes(args: Namespace, layers: int) -> int:
    """Return the bytes of one rank at this depth."""
    logits = args.micro_batch_size * args.seq_length * args.padded_vocab_size
    held = sum(memory(Namespace(**vars(args) | {"num_layers": layers})).values())
    return held + 4 * FP32_COPIES * int(logits)


def deepest(args: Namespace, gib: float) -> int:
    """The most layers, at most the recipe's own, that fit; 0 where none do."""
    room = (1 - FREE) * gib * 2**30
    depths = range(args.num_layers, 0, -1)
    return next((n for n in depths if takes(args, n) <= room), 0)


if __name__ == "__main__":
    recipe, gib, _, *flags = sys.argv[1:]
    args = dry_run(Path(recipe), {}, tuple(flags), ranks=1)
    if args.hybrid_layer_pattern is not None:
        sys.exit(
            "the depth is a GPT's: leave --infoentropy-hybrid and a --hybrid-layer-pattern out"
        )
    layers = deepest(args, float(gib))
    size = takes(args, max(1, layers)) / 2**30
    sys.stderr.write(f"{layers} layers take {size:.1f} of {float(gib):.1f} GiB\n")
    sys.stdout.write(f"{layers}\n")
