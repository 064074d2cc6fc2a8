"""Runs a function on several gloo ranks. One pool of processes a world size, kept across tests:
starting ranks costs seconds, reusing them milliseconds. A failure kills the pool."""

import atexit
import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from torch.distributed import TCPStore

TIMEOUT_S = 120
_pools: dict[int, "_Pool"] = {}


def open_store() -> tuple[TCPStore, dict[str, str]]:
    """A store to rendezvous in, open while it is kept, and the environment that leads ranks to it.

    As under torchrun, rank 0 opens none itself: a port that was free when somebody looked may be
    taken by the time it tries.
    """
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port)}
    torchrun = {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}
    return store, environment | torchrun


def run_ranks(function: Callable[..., Any], world: int, *arguments: Any) -> list[Any]:
    """[function(*arguments) on rank 0, 1, ...]; the default process group is gloo over `world`."""
    if world not in _pools:
        _pools[world] = _Pool(world)
    try:
        return _pools[world].run(function, arguments)
    except BaseException:
        _pools.pop(world).kill()
        raise


class _Pool:
    def __init__(self, world: int) -> None:
        context = multiprocessing.get_context("spawn")
        self.folder = tempfile.TemporaryDirectory()
        store = str(Path(self.folder.name) / "store")
        self.processes, self.pipes = [], []
        for rank in range(world):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, world, store, theirs), daemon=True)
            process.start()
            self.processes.append(process)
            self.pipes.append(ours)

    def run(self, function: Callable[..., Any], arguments: tuple[Any, ...]) -> list[Any]:
        for pipe in self.pipes:
            pipe.send((function, arguments))
        results = []
        for rank, pipe in enumerate(self.pipes):
            if not pipe.poll(TIMEOUT_S):
                raise TimeoutError(f"rank {rank} gave no answer within {TIMEOUT_S} s")
            failed, value = pipe.recv()
            if failed:
                raise AssertionError(f"rank {rank} failed:\n{value}")
            results.append(value)
        return results

    def kill(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()
        self.folder.cleanup()


def _serve(rank: int, world: int, store: str, pipe: Connection) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    while True:
        try:
            function, arguments = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send((False, function(*arguments)))
        except BaseException:
            pipe.send((True, traceback.format_exc()))


@atexit.register
def _kill_pools() -> None:
    for pool in _pools.values():
        pool.kill()
