"""The ranks of a job look at each other before it trains: `infoentropy doctor --distributed`.

1. every rank writes into torchrun's store that it is there; who does not come is named
2. rank 0 counts what the recipe takes; all learn its transfers and its memory
3. every rank collects its facts, measures its clock and does the transfers
4. rank 0 gathers everything and judges
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

from megatron_infoentropy.doctor.collectives import Measured, Transfer, clock_ahead_s, measure
from megatron_infoentropy.doctor.facts import Facts, Place, collect
from megatron_infoentropy.doctor.verdict import DISK_BYTES, troubles

MIB = 2**20
LOOKING = timedelta(hours=6)  # the longest that a rank may read its share of the data
STATISTICS_BYTES = 16  # a token's part of the loss's one all-gather


@dataclass(frozen=True)
class Order:
    """What to look at; `disk` in bytes that must be free, `timeout_s` to wait for a rank."""

    recipe: Path | None = None
    data: Path | None = None
    tokenizer: Path | None = None
    run: Path = Path()
    disk: int = DISK_BYTES
    timeout_s: int = 120


@dataclass(frozen=True)
class Report:
    """What rank 0 tells."""

    facts: list[Facts]
    measured: list[Measured]
    troubles: list[str]


class RankMissing(RuntimeError):
    """Ranks that did not come, by number and host."""


def examine_job(order: Order) -> Report | None:
    """Be one rank of the examination, under torchrun; the report on rank 0, None elsewhere.

    Raises:
        RankMissing: not all ranks came in time.
    """
    import torch
    import torch.distributed as dist

    place = Place.from_environment()
    timeout = timedelta(seconds=order.timeout_s)
    store = _store(place, timeout)
    arrive(store, place, order.timeout_s)
    with_gpu = torch.cuda.is_available()
    device = torch.device("cuda", place.local_rank) if with_gpu else torch.device("cpu")
    if with_gpu:
        torch.cuda.set_device(device)
    backend = "cpu:gloo,cuda:nccl" if with_gpu else "gloo"
    dist.init_process_group(
        backend,
        store=dist.PrefixStore(  # type: ignore[attr-defined]
            "doctor", store
        ),
        rank=place.rank,
        world_size=place.world,
        timeout=timeout,
    )
    plan: list[Any] = [_plan(order, place.world) if place.rank == 0 else None]
    dist.broadcast_object_list(plan)
    transfers, memory_needed, refused = plan[0]
    facts = collect(place, order.data, order.tokenizer, order.run)
    wait_for_all(store, place, LOOKING)
    facts = replace(facts, clock_s=clock_ahead_s(place.rank, place.world))
    measured = measure(transfers, device)
    everyone: list[Facts | None] = [None] * place.world
    dist.all_gather_object(everyone, facts)
    dist.barrier()
    dist.destroy_process_group()
    if place.rank != 0:
        return None
    gathered = [one for one in everyone if one is not None]
    found = troubles(gathered, measured, memory_needed=memory_needed, disk_needed=order.disk)
    return Report(gathered, measured, [*refused, *found])


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


def _plan(order: Order, world: int) -> tuple[list[Transfer], int | None, list[str]]:
    """(transfers, bytes of memory that a rank needs, why the recipe cannot be trained)"""
    if order.recipe is None:
        return [
            Transfer("all-reduce, 16 MiB", "all-reduce", 16 * MIB, world),
            Transfer("all-gather, 1 MiB", "all-gather", MIB, world),
        ], None, []  # fmt: skip
    from megatron_infoentropy.launch.dry_run import dry_run

    try:
        counted = dry_run(order.recipe, {}, tokenizer=order.tokenizer, ranks=world)
    except ValueError as error:
        plain = replace(order, recipe=None)
        return *_plan(plain, world)[:2], [f"the recipe cannot be trained on {world} ranks: {error}"]
    shape = counted.shape
    tokens = shape.micro_batch_size * shape.seq_length
    bucket = min(256 * MIB, counted.memory.gradients)
    transfers = [Transfer("gradients, data parallel", "all-reduce", bucket, world)]
    if shape.tensor_parallel > 1:
        ranks = shape.tensor_parallel
        transfers += [
            Transfer("hidden states, tensor parallel", "all-reduce", shape.hidden_bytes, ranks),
            Transfer("loss, tensor parallel", "all-gather", tokens * STATISTICS_BYTES, ranks),
        ]
    return transfers, counted.memory.total(shape), []


def start_ranks(order: Order, ranks: int) -> Report:
    """The examination with so many ranks on this machine.

    Raises:
        RuntimeError: the ranks failed, with what they said last.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "report.json"
        words = {k: None if v is None else str(v) for k, v in asdict(order).items()}
        done = subprocess.run(
            [
                *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
                *("--nproc-per-node", str(ranks), "-m", "megatron_infoentropy.doctor.rank"),
                *(json.dumps(words), str(path)),
            ],
            capture_output=True,
            text=True,
            errors="replace",
            env={**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")},
        )
        if not path.is_file():
            said = [line for line in done.stderr.splitlines() if "doctor: " in line]
            raise RuntimeError(said[0].strip() if said else done.stderr[-2000:])
        content = json.loads(path.read_text())
    facts = [Facts(**{**one, "problems": tuple(one["problems"])}) for one in content["facts"]]
    measured = [
        Measured(Transfer(**one["transfer"]), one["gbps"], tuple(one["wrong_ranks"]))
        for one in content["measured"]
    ]
    return Report(facts, measured, content["troubles"])
