"""Flags for checkpoints, and what every rank does before Megatron loads one: choose it by sizes.

Every rank looks at the same folder and comes to the same choice, before or after another one has
set the tracker to it, so that they need no word from each other: Megatron reads the checkpoint's
arguments before it makes a process group. Once there is one, rank 0 says what any of them has seen.
"""

import argparse
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from megatron_infoentropy.checkpoints import TRACKER, ManifestWriter, choose, point_tracker

Step = Callable[..., Any]


def add_checkpoint_flags(parser: Any) -> None:
    """Add `--infoentropy-keep-last` to a parser or group."""
    parser.add_argument(
        "--infoentropy-keep-last",
        type=int,
        metavar="N",
        help="delete a complete checkpoint once N newer ones are complete (default: keep all)",
    )


@dataclass(frozen=True)
class CheckpointFlags:
    """The flags of a command line that concern checkpoints."""

    load: Path | None
    pretrained: Path | None
    save: Path | None
    step: int | None
    keep_last: int | None


def checkpoint_flags(words: list[str]) -> CheckpointFlags:
    """Read a training's command line; Megatron's parser comes later and checks the rest of it."""
    parser = argparse.ArgumentParser(allow_abbrev=False, add_help=False)
    parser.add_argument("--load")
    parser.add_argument("--pretrained-checkpoint")
    parser.add_argument("--save")
    parser.add_argument("--ckpt-step", type=int)
    add_checkpoint_flags(parser)
    known, _ = parser.parse_known_args(words)
    keep_last = known.infoentropy_keep_last
    if keep_last is not None and keep_last < 1:
        raise ValueError(f"--infoentropy-keep-last must be at least 1, got {keep_last}")
    save = _local(known.save)
    if keep_last is not None and known.save and save is None:
        raise ValueError(
            f"--infoentropy-keep-last {keep_last} deletes checkpoints in folders alone, and --save "
            f"is {known.save}: leave it out, and delete them there"
        )
    return CheckpointFlags(
        load=_local(known.load),
        pretrained=_local(known.pretrained_checkpoint),
        save=save,
        step=known.ckpt_step or None,
        keep_last=keep_last,
    )


def choose_checkpoint(flags: CheckpointFlags) -> list[str]:
    """Have Megatron's tracker name a complete checkpoint; every rank of the training calls this.

    Returns:
        What `warn` has to tell: a rank that comes later may find the tracker set right, and nothing
        to tell of.

    Raises:
        DamagedCheckpointError: there are checkpoints, and none that can be loaded.
    """
    warnings = []
    if flags.load and (_has_tracker(flags.load) or not flags.pretrained):
        warnings.append(_settle(flags.load, flags))
    if flags.pretrained and not _has_tracker(flags.load):  # as Megatron decides it
        warnings.append(_settle(flags.pretrained, flags))
    return [warning for warning in warnings if warning]


def _has_tracker(load: Path | None) -> bool:
    return load is not None and (load / TRACKER).is_file()


def _settle(load: Path, flags: CheckpointFlags) -> str:
    is_ours = flags.save is not None and load.resolve() == flags.save.resolve()
    choice = choose(load, flags.step, is_ours=is_ours)
    if choice.changes_tracker:
        point_tracker(load, choice.name)
    return choice.warning


def warn(warnings: list[str], model: list[Any]) -> list[Any]:
    """Print the warnings of all ranks once, on rank 0; with the first bound, a `pre_wrap_hooks`.

    That is where Megatron's ranks can first speak to each other, before the checkpoint is loaded.
    """
    import torch.distributed as dist  # the command line is read without torch

    every: list[list[str]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(every, warnings)
    if is_first_rank():
        for warning in dict.fromkeys(chain.from_iterable(every)):
            say(f"WARNING: {warning}")
    return model


def is_first_rank() -> bool:
    return os.environ.get("RANK", "0") == "0"


@contextmanager
def writing_manifests(flags: CheckpointFlags, step: Step) -> Iterator[Step]:
    """Yield `step`, Megatron's forward step, such that rank 0 sees what was saved.

    Leaving the block waits for manifests that are being written.
    """
    if flags.save is None or not is_first_rank():
        yield step
        return
    with ManifestWriter(flags.save, flags.keep_last, say) as writer:

        def watching_step(*args: Any, **options: Any) -> Any:
            writer.look()
            return step(*args, **options)

        yield watching_step


def say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def _local(path: str | None) -> Path | None:
    """None for what only Megatron's own storage client can open."""
    return None if path is None or "://" in path else Path(path)
