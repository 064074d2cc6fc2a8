"""Starts Megatron's trainer on gloo ranks of this machine.

Ranks are forked from a server that has imported Megatron already: importing it takes ten seconds,
training these models one or two. (A user's own way, torchrun, is what tests/end_to_end takes, by
`serve_ranks`; test_more_rows there has its rank import Megatron, too.)
"""

import multiprocessing
import os
import pickle
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import quick_ranks
import torch.distributed as dist
from ranks import open_store

from megatron_infoentropy.runtime.cpu import CPU_FLAGS

TINY_MODEL = [
    *("--num-layers=2", "--hidden-size=32", "--ffn-hidden-size=48", "--init-method-std=0.2"),
    *("--num-attention-heads=4", "--group-query-attention", "--num-query-groups=2"),
    *("--seq-length=16", "--max-position-embeddings=16", "--position-embedding-type=rope"),
    *("--normalization=RMSNorm", "--swiglu", "--no-bias-swiglu-fusion", "--disable-bias-linear"),
    *("--untie-embeddings-and-output-weights", "--attention-dropout=0", "--hidden-dropout=0"),
    *("--eval-iters=0", "--eval-interval=1000", "--log-interval=1", "--lr-decay-style=constant"),
]
TINY_TRAINING = [  # flags that follow have the last word
    *TINY_MODEL,
    *("--mock-data", "--tokenizer-type=NullTokenizer", "--vocab-size=256", "--lr=1e-3"),
    *("--micro-batch-size=2", "--global-batch-size=4", "--train-iters=1"),
]
ENVIRONMENT = {
    # The server takes its modules from here: Python 3.12 does not hand it sys.path.
    "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]),
    "OMP_NUM_THREADS": "1",
    "CUDA_DEVICE_MAX_CONNECTIONS": "1",
    "TORCHDYNAMO_DISABLE": "1",
    **{"WANDB_MODE": "offline", "WANDB_SILENT": "true"},
}
TIMEOUT_S = 180

_server = multiprocessing.get_context("forkserver")
_server.set_forkserver_preload(["preloaded"])


def run_trainer(
    ranks: int, main: Callable[..., None], arguments: tuple, flags: list[str], folder: Path
) -> str:
    """Call main(*arguments) on every rank with `flags` as its command line; rank 0's output."""
    _start_server()
    store, rendezvous = open_store()
    processes = []
    for rank in range(ranks):
        environment = {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(ranks),
            "LOCAL_WORLD_SIZE": str(ranks),
            **rendezvous,
        }
        log = folder / f"rank{rank}.log"
        words = [*CPU_FLAGS, *flags]
        # Not a daemon: those may not start the processes that write checkpoints.
        process = _server.Process(target=_rank, args=(main, arguments, words, environment, log))
        process.start()
        processes.append(process)
    try:
        for process in processes:
            process.join(TIMEOUT_S)
        codes = [process.exitcode for process in processes]
    finally:
        for process in processes:
            _end_group(process)
        del store
    failed = [rank for rank, code in enumerate(codes) if code != 0]
    if failed:
        log = (folder / f"rank{failed[0]}.log").read_text()
        raise AssertionError(f"exit codes {codes}; rank {failed[0]}:\n{log[-5000:]}")
    return (folder / "rank0.log").read_text()


def _start_server() -> None:
    """With an environment that it keeps and this process does not: other tests here compile."""
    before = dict(os.environ)
    os.environ.update(ENVIRONMENT)
    try:
        forkserver.ensure_running()
    finally:
        os.environ.clear()
        os.environ.update(before)


def run_forked(function: Callable[..., Any], ranks: int, *arguments: Any) -> list[Any]:
    """[function(*arguments) on rank 0, 1, ...]: `ranks.run_ranks` where Megatron is imported."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        run_trainer(ranks, _answer, (function, arguments, folder), [], folder)
        return [pickle.loads((folder / str(rank)).read_bytes()) for rank in range(ranks)]


def _answer(function, arguments, folder):
    dist.init_process_group("gloo")
    (folder / str(dist.get_rank())).write_bytes(pickle.dumps(function(*arguments)))


@contextmanager
def serve_ranks(folder: Path) -> Iterator[dict[str, str]]:
    """Environment variables that make torchrun's ranks forks of the server: see quick_ranks."""
    _start_server()
    shim, path = folder / "python", folder / "socket"
    # -S and -I: the client needs nothing but the standard library, and starts at once.
    shim.write_text(f'#!/bin/sh\nexec {sys.executable} -I -S {quick_ranks.__file__} "$@"\n')
    shim.chmod(0o755)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen(16)
        server = _server.Process(target=quick_ranks.serve, args=(listener,))
        server.start()
    try:
        yield {"QUICK_RANKS": str(path), "PYTHON_EXEC": str(shim), "OMP_NUM_THREADS": "1"}
    finally:
        _end_group(server)


def _end_group(process):
    """The rank and what it started (the server of its checkpoint writers outlives it)."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.kill()


def _rank(main, arguments, words, environment, log):
    from megatron.training import training  # in the server alone: importing it takes ten seconds

    os.setpgid(0, 0)
    os.environ.update(environment)
    sys.argv = [main.__module__, *words]
    # Megatron counts --exit-duration-in-mins from its import, which the server did minutes ago.
    training.set_startup_timestamps(program_start=time.time())
    with log.open("w") as file, redirect_stdout(file), redirect_stderr(file):
        try:
            main(*arguments)
        except BaseException:
            traceback.print_exc()
            file.flush()
            os._exit(1)
        file.flush()
        os._exit(0)  # the ranks' process groups need no orderly end
