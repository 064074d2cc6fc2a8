"""The ranks of a job look at each other before it trains: `infoentropy doctor --distributed`.

1. every rank writes into torchrun's store that it is there; who does not come is named
2. every rank collects its facts; rank 0 counts what the recipe takes
3. all learn the recipe's transfers, measure their clocks and do the transfers
4. all gather everything and judge alike; rank 0 tells
"""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_infoentropy.doctor.collectives import Transfer, clock_ahead_s, measure
from megatron_infoentropy.doctor.facts import Facts, Place, collect
from megatron_infoentropy.doctor.report import Report
from megatron_infoentropy.doctor.verdict import DISK_BYTES, troubles

if TYPE_CHECKING:
    import torch

MIB = 2**20
LOOKING = timedelta(hours=6)  # the longest that a rank may read its share of the data
STATISTICS_BYTES = 16  # a token's part of the loss's one all-gather
BUCKET_BYTES = 256 * MIB  # of gradients, which are more; enough to see the network's speed


@dataclass(frozen=True)
class Order:
    """What to look at; `settings` and `flags` change the recipe as they do in a training.

    `disk` are the bytes that must be free, `timeout_s` is how long to wait for a rank; with
    `local_data` every host has a copy of the data.
    """

    recipe: Path | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    flags: tuple[str, ...] = ()
    data: Path | None = None
    local_data: bool = False
    tokenizer: Path | None = None
    run: Path = Path()
    disk: int = DISK_BYTES
    timeout_s: int = 120


class RankMissing(RuntimeError):
    """Ranks that did not come, by number and host."""


def examine_job(order: Order, tell: Callable[[Report], None]) -> Report:
    """Be one rank of the examination, under torchrun; rank 0 tells the report, all return it.

    Raises:
        RankMissing: not all ranks came in time.
    """
    import torch
    import torch.distributed as dist

    place = Place.from_environment()
    store = _store(place, timedelta(seconds=order.timeout_s))
    arrive(store, place, order.timeout_s)
    device = torch.device("cuda", place.local_rank) if torch.cuda.is_available() else None
    facts = collect(place, order.data, order.tokenizer, order.run, local_data=order.local_data)
    plan = [_plan(order, facts, place.world) if place.rank == 0 else None]
    wait_for_all(store, place, LOOKING)
    _meet(store, place, device, order.timeout_s)
    dist.broadcast_object_list(plan)
    assert plan[0] is not None
    transfers, memory_needed, refused = plan[0]
    facts = replace(facts, clock_s=clock_ahead_s(place.rank, place.world))
    measured = measure(transfers, device or torch.device("cpu"))
    everyone: list[Facts | None] = [None] * place.world
    dist.all_gather_object(everyone, facts)
    gathered = [one for one in everyone if one is not None]
    found = troubles(gathered, measured, memory_needed=memory_needed, disk_needed=order.disk)
    looked_at = (order.tokenizer, order.run, order.disk)
    report = Report(gathered, measured, memory_needed, *looked_at, [*refused, *found])
    if place.rank == 0:
        tell(report)
    dist.barrier()  # torchrun ends all ranks when one ends with an exit code
    dist.destroy_process_group()
    return report


def _meet(store: Any, place: Place, device: "torch.device | None", timeout_s: int) -> None:
    """Start the process group, through gloo and where there are GPUs NCCL."""
    import torch
    import torch.distributed as dist

    if device is not None:
        torch.cuda.set_device(device)
    dist.init_process_group(
        "gloo" if device is None else "cpu:gloo,cuda:nccl",
        store=dist.PrefixStore(  # type: ignore[attr-defined]
            "doctor", store
        ),
        rank=place.rank,
        world_size=place.world,
        timeout=timedelta(seconds=timeout_s),
    )


def _store(place: Place, timeout: timedelta) -> Any:
    """torchrun's own store, or one on rank 0 where its agent has none for the ranks."""
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    agents = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    return TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        place.world,
        is_master=not agents and place.rank == 0,
        timeout=timeout,
        wait_for_workers=False,
    )


def arrive(store: Any, place: Place, timeout_s: float) -> None:
    """Say that this rank is there, and wait for all others.

    Raises:
        RankMissing: names those that did not come, and the hosts of those that did.
    """
    import socket

    from torch.distributed import DistStoreError

    store.set(f"doctor/{place.rank}", socket.gethostname())
    deadline = time.monotonic() + timeout_s
    came: dict[int, str] = {}
    for rank in range(place.world):
        left = timedelta(seconds=max(0.1, deadline - time.monotonic()))
        try:
            store.wait([f"doctor/{rank}"], left)
            came[rank] = store.get(f"doctor/{rank}").decode()
        except DistStoreError:
            continue
    missing = [rank for rank in range(place.world) if rank not in came]
    if missing:
        raise RankMissing(_missing(missing, came, place, timeout_s))


def wait_for_all(store: Any, place: Place, longest: timedelta) -> None:
    """Wait until every rank has looked: a collective would give up after the time-out of one."""
    store.set(f"doctor/looked/{place.rank}", "")
    store.wait([f"doctor/looked/{rank}" for rank in range(place.world)], longest)


def _missing(missing: list[int], came: dict[int, str], place: Place, timeout_s: float) -> str:
    names = []
    for rank in missing:
        node = rank // place.local_world
        hosts = {host for at, host in came.items() if at // place.local_world == node}
        where = f"node {node}" + (f", {hosts.pop()}" if hosts else ", which no rank came from")
        names.append(f"rank {rank} ({where})")
    return (
        f"{', '.join(names)} did not come within {timeout_s:g} s; {len(came)} of {place.world} "
        f"are there, from {', '.join(sorted(set(came.values())))}: look at what the missing ones "
        "said last, and whether their host is up"
    )


def _plan(order: Order, facts: Facts, world: int) -> tuple[list[Transfer], int | None, list[str]]:
    """(transfers, bytes of memory that a rank needs, why the recipe cannot be trained)"""
    if order.recipe is None:
        return _any_transfers(world), None, []
    from megatron_infoentropy.launch.dry_run import dry_run

    try:
        _require_fitting(order, facts)
        counted = dry_run(
            order.recipe, order.settings, order.flags, tokenizer=order.tokenizer, ranks=world
        )
    except ValueError as error:
        refused = f"the recipe cannot be trained on {world} ranks: {error}"
        return _any_transfers(world), None, [refused]
    shape = counted.shape
    tensor, data = shape.tensor_parallel, shape.data_parallel
    tokens = shape.micro_batch_size * shape.seq_length
    bucket = min(BUCKET_BYTES, counted.memory.gradients)
    transfers = [
        Transfer("gradients", "all-reduce", bucket, data, stride=tensor),
        Transfer("hidden states", "all-reduce", shape.hidden_bytes, tensor),
        Transfer("loss", "all-gather", tokens * STATISTICS_BYTES, tensor),
    ]
    return [each for each in transfers if each.ranks > 1], counted.memory.total(shape), []


def _require_fitting(order: Order, facts: Facts) -> None:
    """What a training refuses of recipe and data together, if each can be used."""
    from megatron_infoentropy.launch.job import TrainingJob
    from megatron_infoentropy.runtime.device import find_device

    fits = facts.data is not None and facts.data.tokenizer == facts.tokenizer  # else told elsewhere
    if order.recipe and order.data and order.tokenizer and fits and not facts.problems:
        job = TrainingJob(
            order.recipe,
            order.data,
            order.tokenizer,
            order.run,
            order.settings,
            extra_flags=order.flags,
        )
        job.flags(find_device())


def _any_transfers(world: int) -> list[Transfer]:
    """Where no recipe says what is sent."""
    if world == 1:
        return []
    return [
        Transfer("all-reduce", "all-reduce", 16 * MIB, world),
        Transfer("all-gather", "all-gather", MIB, world),
    ]
