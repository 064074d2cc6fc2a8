"""Runs a function on several gloo ranks. One pool of processes a world size, kept across tests:
starting ranks costs seconds, reusing them milliseconds. A failure kills the pool."""

import atexit
import functools
import multiprocessing
import os
import signal
import socket
import tempfile
import traceback
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Client, Connection, wait
from pathlib import Path
from typing import Any

from torch.distributed import TCPStore

from megatron_infoentropy.runtime import orphans

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
        self.folder = tempfile.TemporaryDirectory()
        store, address = (str(Path(self.folder.name) / name) for name in ("store", "ranks"))
        with socket.socket(socket.AF_UNIX) as listener:
            listener.settimeout(TIMEOUT_S)  # where no rank comes, as of a package that is broken
            listener.bind(address)
            listener.listen(world)
            _forker().send((world, store, address))
            arrived = [Connection(listener.accept()[0].detach()) for _ in range(world)]
        self.ranks = dict(sorted((pipe.recv(), pipe) for pipe in arrived))

    def run(self, function: Callable[..., Any], arguments: tuple[Any, ...]) -> list[Any]:
        for pipe in self.ranks.values():
            pipe.send((function, arguments))
        waiting = {pipe: rank for (rank, _), pipe in self.ranks.items()}
        results = {}
        while waiting:  # not in turn: the others may wait for one that has failed
            if not (ready := wait(list(waiting), TIMEOUT_S)):
                ranks = ", ".join(map(str, waiting.values()))
                raise TimeoutError(f"ranks {ranks} gave no answer within {TIMEOUT_S} s")
            for pipe in ready:
                rank = waiting.pop(pipe)
                failed, results[rank] = pipe.recv()
                if failed:
                    raise AssertionError(f"rank {rank} failed:\n{results[rank]}")
        return [results[rank] for rank in sorted(results)]

    def kill(self) -> None:
        for _, pid in self.ranks:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.folder.cleanup()


@functools.cache
def _forker() -> Connection:
    """A pipe to the process that forks all ranks: importing torch takes each one seconds."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    context.Process(target=_fork_ranks, args=(theirs,), daemon=True).start()
    return ours


def _fork_ranks(orders: Connection) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    import megatron_infoentropy.loss  # noqa: F401

    orphans.leave_none()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for a rank
    while True:
        world, store, address = orders.recv()
        for rank in range(world):
            if os.fork() == 0:
                try:
                    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                    _serve(rank, world, store, Client(address))
                finally:  # whatever happened, a rank is not to go on here
                    os._exit(1)


def _serve(rank: int, world: int, store: str, pipe: Connection) -> None:
    import torch
    import torch.distributed as dist

    pipe.send((rank, os.getpid()))
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
