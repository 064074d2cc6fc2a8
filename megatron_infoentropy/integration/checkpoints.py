"""Flags for checkpoints, and what all ranks do before Megatron loads one: verify, and agree.

Every rank verifies its share of the files; they agree through the store of torchrun's rendezvous,
because Megatron reads the checkpoint's arguments before it makes a process group.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from torch.distributed import PrefixStore  # type: ignore[attr-defined]
from torch.distributed.rendezvous import rendezvous

from megatron_infoentropy.checkpoints.choice import DamagedCheckpointError, choose
from megatron_infoentropy.checkpoints.folder import TRACKER, point_tracker
from megatron_infoentropy.checkpoints.keeper import CheckpointKeeper
from megatron_infoentropy.checkpoints.manifest import find_damage
from megatron_infoentropy.integration.meeting import meet

Step = Callable[..., Any]
LONGEST_WAIT = timedelta(hours=6)  # for the slowest rank's share of a checkpoint of terabytes


def add_checkpoint_flags(parser: Any) -> None:
    """Add `--infoentropy-keep-last` and `--infoentropy-verify-checkpoint` to a parser or group."""
    parser.add_argument(
        "--infoentropy-keep-last",
        type=int,
        metavar="N",
        help="delete a complete checkpoint once N newer ones are complete (default: keep all)",
    )
    parser.add_argument(
        "--infoentropy-verify-checkpoint",
        choices=("checksums", "sizes"),
        default="checksums",
        help="what of a checkpoint is compared with its manifest before it is loaded; sizes reads "
        "no file (default: checksums)",
    )


@dataclass(frozen=True)
class CheckpointFlags:
    """What a command line says of checkpoints."""

    load: Path | None
    pretrained: Path | None
    save: Path | None
    step: int | None
    keep_last: int | None
    checksums: bool


def checkpoint_flags(words: list[str]) -> CheckpointFlags:
    """Read a training's command line; Megatron's parser comes later and checks the rest of it.

    Raises:
        ValueError: --infoentropy-keep-last below 1.
    """
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
    checksums = known.infoentropy_verify_checkpoint == "checksums"
    return CheckpointFlags(
        load=_local(known.load),
        pretrained=_local(known.pretrained_checkpoint),
        save=_local(known.save),
        step=known.ckpt_step or None,
        keep_last=keep_last,
        checksums=checksums,
    )


def choose_checkpoint(flags: CheckpointFlags) -> None:
    """Have Megatron's tracker name a complete checkpoint; every rank of the training calls this.

    Raises:
        DamagedCheckpointError: there are checkpoints, and none that can be loaded.
    """
    if not flags.load and not flags.pretrained:
        return
    ranks = VerifyingRanks(flags.checksums)
    if ranks.rank != 0:
        ranks.follow()
        return
    reason = "rank 0 ended"
    try:
        if flags.load and (_has_tracker(flags.load) or not flags.pretrained):
            _settle(flags.load, flags, ranks)
        if flags.pretrained and not _has_tracker(flags.load):  # as Megatron decides it
            _settle(flags.pretrained, flags, ranks)
        reason = ""
    except ValueError as error:
        reason = str(error)
        raise
    finally:
        ranks.dismiss(reason)


def _has_tracker(load: Path | None) -> bool:
    return load is not None and (load / TRACKER).is_file()


def _settle(load: Path, flags: CheckpointFlags, ranks: "VerifyingRanks") -> None:
    is_ours = flags.save is not None and load.resolve() == flags.save.resolve()
    choice = choose(load, flags.step, ranks.find_damage, is_ours=is_ours)
    if choice.warning:
        say(f"WARNING: {choice.warning}")
    if choice.changes_tracker:
        point_tracker(load, choice.name)


class VerifyingRanks:
    """Rank 0 asks for folders to be verified, the others do their shares of it, until dismissed."""

    def __init__(self, checksums: bool) -> None:
        self.rank = int(os.environ.get("RANK", "0"))
        self.ranks = int(os.environ.get("WORLD_SIZE", "1"))
        self._checksums = checksums
        self._asked = 0
        if self.ranks > 1:
            store, self.rank, _ = next(rendezvous("env://"))
            shared = PrefixStore("infoentropy checkpoint", store)
            self._store = meet(shared, self.rank, self.ranks)
            store.set_timeout(LONGEST_WAIT)

    def find_damage(self, folder: Path) -> str:
        """On rank 0: what is wrong with a checkpoint, "" for nothing."""
        self._ask({"folder": str(folder)})
        found = [self._share(folder), *self._answers()]
        return next((damage for damage in found if damage), "")

    def dismiss(self, reason: str) -> None:
        """On rank 0, at the end: let the others go on, or fail for this reason."""
        self._ask({"end": reason})
        self._answers()  # the store is rank 0's own: it must last until all have read

    def follow(self) -> None:
        """On the other ranks: verify what rank 0 asks for.

        Raises:
            DamagedCheckpointError: rank 0 found nothing that can be loaded.
        """
        while True:
            self._asked += 1
            order = json.loads(self._store.get(f"{self._asked}"))
            is_end = "end" in order
            answer = "" if is_end else self._share(Path(order["folder"]))
            self._store.set(f"{self._asked}/{self.rank}", answer)
            if is_end and order["end"]:
                raise DamagedCheckpointError(order["end"])
            if is_end:
                return

    def _share(self, folder: Path) -> str:
        return find_damage(folder, checksums=self._checksums, part=(self.rank, self.ranks))

    def _ask(self, order: dict[str, str]) -> None:
        self._asked += 1
        if self.ranks > 1:
            self._store.set(f"{self._asked}", json.dumps(order))

    def _answers(self) -> list[str]:
        keys = [f"{self._asked}/{rank}" for rank in range(1, self.ranks)]
        return [self._store.get(key).decode() for key in keys]


@contextmanager
def keeping_checkpoints(flags: CheckpointFlags, step: Step) -> Iterator[Step]:
    """Yield `step`, Megatron's forward step, such that rank 0 keeps watch over what was saved.

    Leaving the block waits for manifests that are being written.
    """
    if flags.save is None or os.environ.get("RANK", "0") != "0":
        yield step
        return
    with CheckpointKeeper(flags.save, flags.keep_last, say) as keeper:

        def watching_step(*args: Any, **options: Any) -> Any:
            keeper.notice()
            return step(*args, **options)

        yield watching_step


def say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def _local(path: str | None) -> Path | None:
    """None for what only Megatron's own storage client can open."""
    return None if path is None or "://" in path else Path(path)
