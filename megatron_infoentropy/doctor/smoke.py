"""A look at a job's ranks before it trains: `infoentropy doctor --distributed`.

Every rank says in torchrun's store that it is there, and one that does not come is named. Each
looks at its own host and data, all do the collectives that the recipe needs, and rank 0 prints what
every rank saw and a sentence for each trouble.
"""

import hashlib
import logging
import os
import platform
import shutil
import socket
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

from megatron_infoentropy.data.indexed import IndexedReader
from megatron_infoentropy.data.manifest import MANIFEST, load_manifest
from megatron_infoentropy.files import file_sha256
from megatron_infoentropy.launch.job import (
    SPLITS,
    command_line,
    conversation_files,
    require_tokenizer,
)

PACKAGES = ("megatron-infoentropy", "torch", "megatron-core", "transformers", "transformer-engine")
GIB, MIB = 2**30, 2**20
LOOKING_S = 6 * 3600  # the longest that a rank may take to look, or to plan
BUCKET_BYTES = 256 * MIB  # of gradients, which are more; enough to see the network's speed
CLOCK_S = 1.0  # apart; logs and Slurm's limits are compared by eye, certificates by machines
ON_TOP = 1.1  # of the counted memory: workspaces, communication buffers, fragmentation


@dataclass(frozen=True)
class Order:
    """What to look at; `settings` and `flags` change the recipe as they do in a training.

    `disk` are the bytes that must be free, `timeout_s` is how long to wait for a rank.
    """

    recipe: Path | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    flags: tuple[str, ...] = ()
    data: Path | None = None
    tokenizer: Path | None = None
    run: Path = Path()
    disk: int = 20 * GIB
    timeout_s: int = 120


class JobRank(NamedTuple):
    """One of the job's processes, as torchrun numbers them."""

    rank: int
    world: int
    local_rank: int
    local_world: int


@dataclass
class Facts:
    """What one rank sees of its own host; `problems` are sentences about that."""

    rank: int
    host: str
    free: int = 0  # bytes of memory that this rank may use
    same: dict[str, str] = field(default_factory=dict)  # what should be the same on every rank
    seen: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    made_with: str = ""  # SHA-256 of the data's tokenizer
    clock_s: float = 0.0  # ahead of rank 0's


class Collective(NamedTuple):
    """One of the training: `size` bytes of every rank, over every `stride`-th rank."""

    name: str
    size: int
    ranks: int  # of a group
    stride: int = 1
    gathers: bool = False  # else it sums


def start_ranks(words: Sequence[str], ranks: int) -> int:
    """Run `infoentropy doctor WORDS` on so many ranks of this machine; return their exit code."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    where = {"run_id": "doctor", "rdzv_backend": "c10d", "rdzv_endpoint": "localhost:0"}
    config = LaunchConfig(1, 1, ranks, max_restarts=0, **where)  # type: ignore[arg-type]
    # The ranks say what is wrong.
    logging.getLogger("torch.distributed.elastic.multiprocessing.api").setLevel(logging.CRITICAL)
    try:
        elastic_launch(config, sys.executable)("-m", "megatron_infoentropy", "doctor", *words)
    except (ChildFailedError, SignalException):
        return 1
    return 0


def examine_job(order: Order, tell: Callable[[str], object]) -> list[str]:
    """Be one rank of the examination, under torchrun; rank 0 tells it, all return the troubles.

    Raises:
        ValueError: this is no rank of torchrun's, or its host has fewer GPUs than ranks.
        RuntimeError: not all ranks came in time.
    """
    import torch
    import torch.distributed as dist

    me = _rank_here()
    store = _store(me, order.timeout_s)
    arrive(store, me, "start", order.timeout_s)
    facts = look(me, order)
    plan: list[Any] = [_plan(order, facts, me.world) if me.rank == 0 else None]
    # Rank 0 has started Megatron to plan: a collective would give up after the time-out of one.
    arrive(store, me, "look", LOOKING_S)
    has_gpu = torch.cuda.is_available()
    device = torch.device("cuda", me.local_rank) if has_gpu else torch.device("cpu")
    if has_gpu:
        torch.cuda.set_device(device)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if has_gpu else "gloo",
        store=dist.PrefixStore("doctor", store),  # type: ignore[attr-defined]
        rank=me.rank,
        world_size=me.world,
        timeout=timedelta(seconds=order.timeout_s),
    )
    dist.broadcast_object_list(plan)
    collectives, memory, refused = plan[0]
    facts.clock_s = clock_at_once()
    require_memory(facts, memory)
    done = [do_collective(each, device) for each in collectives]
    everyone = gathered(facts)
    said = [*refused, *troubles(everyone), *(trouble for _, wrong in done for trouble in wrong)]
    if me.rank == 0:
        end = f"troubles: {len(said)}; mend before the training" if said else "ok  all is well"
        seen = [line for one in everyone for line in one.seen] + [line for line, _ in done]
        needs = [f"a rank takes {memory / GIB:.1f} GiB of memory by the recipe"] if memory else []
        tell("\n".join([*seen, *needs, *(f"!!  {trouble}" for trouble in said), end]))
    dist.barrier()  # torchrun ends all ranks when one ends with an exit code
    dist.destroy_process_group()
    return said


def _rank_here() -> JobRank:
    import torch

    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    missing = {*names, "MASTER_ADDR", "MASTER_PORT"} - set(os.environ)
    if missing:
        raise ValueError(
            f"RANK is set, as torchrun does, without {', '.join(sorted(missing))}: start the ranks "
            "by torchrun, or unset RANK, so that they are started here"
        )
    me = JobRank(*(int(os.environ[name]) for name in names))
    if torch.cuda.is_available() and me.local_world > torch.cuda.device_count():
        raise ValueError(
            f"expected a GPU for every rank on {socket.gethostname()}, got {me.local_world} ranks "
            f"and {torch.cuda.device_count()} GPUs: start fewer ranks there (--ranks, or "
            "torchrun's --nproc-per-node)"
        )
    return me


def _store(me: JobRank, timeout_s: int) -> Any:
    """Return torchrun's own store, or one on rank 0 where its agent has none for the ranks."""
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    agents = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    return TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        me.world,
        is_master=not agents and me.rank == 0,
        timeout=timedelta(seconds=timeout_s),
        wait_for_workers=False,
    )


def arrive(store: Any, me: JobRank, where: str, timeout_s: float) -> None:
    """Say that this rank has come so far, and wait for all others.

    Raises:
        RuntimeError: names those that did not come, and the hosts of those that did.
    """
    from torch.distributed import DistStoreError

    keys = [f"doctor/{where}/{rank}" for rank in range(me.world)]
    store.set(keys[me.rank], socket.gethostname())
    with suppress(DistStoreError):
        store.wait(keys, timedelta(seconds=timeout_s))
        return
    came = {rank: store.get(key).decode() for rank, key in enumerate(keys) if store.check([key])}
    names = []
    for rank in (rank for rank in range(me.world) if rank not in came):
        node = rank // me.local_world
        hosts = {host for at, host in came.items() if at // me.local_world == node}
        where = f"node {node}" + (f", {hosts.pop()}" if hosts else ", which no rank came from")
        names.append(f"rank {rank} ({where})")
    if names:
        raise RuntimeError(
            f"{', '.join(names)} did not come within {timeout_s:g} s; {len(came)} of {me.world} "
            f"are there, from {', '.join(sorted(set(came.values())))}: look at what the missing "
            "ones said last, and whether their host is up"
        )


def look(me: JobRank, order: Order) -> Facts:
    """Look at this rank's device, disk, versions, data and tokenizer."""
    device, free = _device(me)
    folder = order.run.absolute()
    disk = shutil.disk_usage(next(f for f in (folder, *folder.parents) if f.exists())).free
    facts = Facts(me.rank, socket.gethostname(), free, {"device": device.partition(",")[0]})
    facts.same |= {"Python": platform.python_version(), **dict.fromkeys(PACKAGES, "none")}
    for name in PACKAGES:
        with suppress(PackageNotFoundError):
            facts.same[name] = version(name)
    facts.seen = [
        f"rank {me.rank} on {facts.host}: {device}; {free / GIB:.1f} GiB of memory and "
        f"{disk / GIB:.1f} GiB of disk are free"
    ]
    if disk < order.disk:
        facts.problems.append(
            f"{disk / GIB:.1f} GiB are free for the run folder, wanted are "
            f"{order.disk / GIB:.1f}: make room, or name another --run"
        )
    if order.data is not None:
        look_at_data(facts, order.data)
    if order.tokenizer is not None:
        try:
            require_tokenizer(order.tokenizer, facts.made_with or None)
        except (OSError, ValueError) as error:
            facts.problems.append(str(error))
    return facts


def _device(me: JobRank) -> tuple[str, int]:
    """Return the device's name and the bytes of memory that are free for this rank."""
    import torch

    if torch.cuda.is_available():
        free, _ = torch.cuda.mem_get_info(me.local_rank)
        nccl = ".".join(map(str, torch.cuda.nccl.version()))  # type: ignore[no-untyped-call]
        name = torch.cuda.get_device_name(me.local_rank)
        return f"{name} with CUDA {torch.version.cuda} and NCCL {nccl}", free
    lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
    available = next(line for line in lines if line.startswith("MemAvailable"))
    return f"CPU, {os.cpu_count()} cores", int(available.split()[1]) * 1024 // me.local_world


def look_at_data(facts: Facts, data: Path) -> None:
    """Open every dataset below `data`; `infoentropy verify` reads every byte.

    Files of conversations have no manifest: every rank reads them, and all must read the same.
    """
    chats = conversation_files(data)
    digest, opened = hashlib.sha256(), len(chats)
    for path in chats.values():
        digest.update(file_sha256(path).encode())
    for split in () if chats else SPLITS:
        try:
            manifest = load_manifest(data / split)
            digest.update((data / split / MANIFEST).read_bytes())
            facts.made_with = facts.made_with or manifest.tokenizer.sha256  # of the training data
            for name in manifest.domains:
                IndexedReader(manifest.prefix(name))
                opened += 2
        except (OSError, ValueError) as error:
            facts.problems.append(str(error))
    facts.same["data with the manifests"] = digest.hexdigest()[:12]
    facts.seen.append(f"  {opened} data files opened")


def require_memory(facts: Facts, needed: int) -> None:
    """Note a problem where less is free than the recipe takes."""
    if facts.free < needed * ON_TOP:
        facts.problems.append(
            f"{facts.free / GIB:.1f} GiB of memory are free, the recipe takes "
            f"{needed / GIB:.1f} and a tenth on top: end what runs there, or choose a smaller "
            "micro-batch or more parallelism; `infoentropy train RECIPE --dry-run` counts"
        )


def _plan(order: Order, facts: Facts, world: int) -> tuple[list[Collective], int, list[str]]:
    """Return the collectives, the memory of a rank, 0 for unknown, and why none can train."""
    anyway = [Collective("all ranks", 16 * MIB, world)]
    if order.recipe is None:
        return anyway, 0, []
    from megatron_infoentropy.launch.dry_run import STATISTICS_BYTES, dry_run, hidden_bytes, memory
    from megatron_infoentropy.runtime.device import find_device

    try:
        if order.data and order.tokenizer and not facts.problems:  # else told elsewhere
            places = {"data": order.data, "tokenizer": order.tokenizer}
            command_line(find_device(), order.recipe, order.settings, order.flags, **places)
        args = dry_run(
            order.recipe, order.settings, order.flags, tokenizer=order.tokenizer, ranks=world
        )
    except (OSError, ValueError) as error:
        return anyway, 0, [f"the recipe cannot be trained on {world} ranks: {error}"]
    held = memory(args)
    tensor, tokens = args.tensor_model_parallel_size, args.micro_batch_size * args.seq_length
    bucket = min(BUCKET_BYTES, held["gradients"])
    collectives = [
        Collective("gradients", bucket, args.data_parallel_size, stride=tensor),
        Collective("hidden states", hidden_bytes(args), tensor),
        Collective("loss", tokens * STATISTICS_BYTES, tensor, gathers=True),
    ]
    return [each for each in collectives if each.ranks > 1], sum(held.values()), []


def gathered(mine: Any) -> list[Any]:
    """Return what every rank gives, in the order of the ranks."""
    import torch.distributed as dist

    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    return everyone


def clock_at_once(clock: Callable[[], float] = time.time) -> float:
    """Return by how much this rank's clock is ahead of rank 0's, as all leave a barrier."""
    import torch.distributed as dist

    dist.barrier()
    now = clock()
    return float(now - gathered(now)[0])


def do_collective(collective: Collective, device: Any) -> tuple[str, list[str]]:
    """Do it some times; every rank calls this. Returns a line about it, and what was wrong."""
    import torch
    import torch.distributed as dist

    name, size, ranks, stride, gathers = collective
    groups = members(ranks, stride, dist.get_world_size())
    group: Any = dist.new_subgroups_by_enumeration(groups)[0]
    factors, pattern = [rank % 8 + 1 for rank in range(ranks)], small_numbers(size // 4, device)
    seconds = []
    for _ in range(3):
        mine = pattern * factors[dist.get_rank(group)]
        parts = [torch.empty_like(mine) for _ in factors] if gathers else [mine]
        dist.barrier(group)
        start = time.perf_counter()
        if gathers:
            dist.all_gather(parts, mine, group=group)
        else:
            dist.all_reduce(mine, group=group)
        parts[0][0].item()  # waits for a GPU
        seconds.append(time.perf_counter() - start)
    expected = [pattern * factor for factor in (factors if gathers else [sum(factors)])]
    results = gathered((min(seconds), all(map(torch.equal, parts, expected))))
    slowest = max(took for took, _ in results)
    sent = size * (ranks - 1) * (1 if gathers else 2 / ranks)  # by a rank in a ring
    line = (
        f"{name}: {'all-gather' if gathers else 'all-reduce'} of {size / MIB:.3g} MiB over {ranks} "
        f"ranks: {1e3 * slowest:.1f} ms, {sent / slowest / 1e9:.2f} GB/s"
    )
    wrong = ", ".join(str(rank) for rank, (_, right) in enumerate(results) if not right)
    trouble = f"{name}: wrong results on ranks {wrong}: a network or a GPU is broken there"
    return line, [f"{trouble}; leave the host out"] if wrong else []


def small_numbers(count: int, device: Any = "cpu") -> Any:
    """Return numbers that float32 adds over thousands of ranks without rounding."""
    import torch

    return torch.arange(max(1, count), dtype=torch.float32, device=device) % 16


def members(ranks: int, stride: int, world: int) -> list[list[int]]:
    """Return the groups of `ranks` that are `stride` apart: as Megatron cuts its world."""
    return [
        [base + first + stride * number for number in range(ranks)]
        for base in range(0, world, ranks * stride)
        for first in range(stride)
    ]


def troubles(facts: list[Facts]) -> list[str]:
    """Return a sentence for whatever would end the job, or spoil it, with the ranks it is about."""
    sentences = []
    for name in dict.fromkeys(name for one in facts for name in one.same):
        usual, _ = Counter(one.same.get(name, "none") for one in facts).most_common(1)[0]
        odd = [one for one in facts if one.same.get(name, "none") != usual]
        for value in sorted({one.same.get(name, "none") for one in odd}):
            who = _who([one for one in odd if one.same.get(name, "none") == value])
            sentences.append(
                f"{who}: {name} {value}, elsewhere {usual}: every host must have the same"
            )
    for said in sorted({problem for one in facts for problem in one.problems}):
        sentences.append(f"{_who([one for one in facts if said in one.problems])}: {said}")
    return sentences + [
        f"{_who([one])}: its clock is {abs(one.clock_s):.1f} s "
        f"{'ahead of' if one.clock_s > 0 else 'behind'} rank 0's: synchronise the hosts "
        "(chrony or ntpd)"
        for one in facts
        if abs(one.clock_s) > CLOCK_S
    ]


def _who(facts: list[Facts]) -> str:
    """Return "rank 3 (host b)" or "ranks 2, 3 (host b)"."""
    ranks = ", ".join(str(one.rank) for one in facts)
    hosts = ", ".join(sorted({one.host for one in facts}))
    return f"rank{'s' if len(facts) > 1 else ''} {ranks} ({hosts})"
