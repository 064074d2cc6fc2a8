"""The two ways to join vocabulary shards, side by side on gloo (or NCCL) ranks of this machine."""

import statistics
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn

from megatron_infoentropy.config import Collective
from megatron_infoentropy.loss.collective import join_shards
from megatron_infoentropy.runtime.device import find_device


def measure_collectives(ranks: int, tokens: int, *, repeats: int) -> dict[str, float]:
    """{collective: median ms} to join statistics of `tokens` tokens over `ranks` ranks."""
    device = find_device()
    with tempfile.TemporaryDirectory() as folder:
        arguments = (ranks, tokens, repeats, device.type, device.backend, folder)
        spawn(_rank, arguments, nprocs=ranks)  # type: ignore[no-untyped-call]
        return dict(torch.load(Path(folder) / "result.pt"))


def _rank(
    rank: int, ranks: int, tokens: int, repeats: int, device: str, backend: str, folder: str
) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        backend, init_method=f"file://{folder}/store", rank=rank, world_size=ranks
    )
    place = torch.device(device, rank) if device == "cuda" else torch.device(device)
    mine = torch.rand(4, tokens, device=place)
    times: dict[str, list[float]] = {"gather": [], "all_reduce": []}
    for _ in range(repeats + 1):
        for collective in times:
            dist.barrier()
            start = time.perf_counter()
            _join(mine, collective)  # type: ignore[arg-type]
            times[collective].append((time.perf_counter() - start) * 1e3)
    if rank == 0:
        medians = {name: statistics.median(values[1:]) for name, values in times.items()}
        torch.save(medians, Path(folder) / "result.pt")
    dist.destroy_process_group()


def _join(mine: torch.Tensor, collective: Collective) -> None:
    joined = join_shards(mine, dist.group.WORLD, collective)
    if joined.tail.is_cuda:
        torch.cuda.synchronize()
