"""The worker processes: blocks go out to whoever is idle, results come back in order.

Processes and not threads, as taking ids out of the encoder and parsing JSON hold the interpreter
lock. The output does not depend on their number: results are handed on in the order of the blocks.
A worker that dies (killed, out of memory) closes its pipe and ends the run at once.
"""

import pickle
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, suppress
from queue import SimpleQueue
from types import TracebackType

from megatron_infoentropy.data.blocks import Block, BrokenLineError
from megatron_infoentropy.data.worker import Encoded, Settings, main, receive, send

_PIPE_BYTES = 1 << 20  # so that a block passes in one go; other systems than Linux ignore it
_WAIT_S = 5


class WorkerDied(RuntimeError):
    """A worker process ended in the middle of its work; what was finished is kept."""


def encode_blocks(
    settings: Settings, blocks: Iterable[Block], *, workers: int
) -> Iterator[tuple[Block, Encoded]]:
    """Encode in `workers` processes; results in the order of the blocks, few of them in flight.

    Raises:
        WorkerDied: which lines it had, how it ended and what to do.
        BrokenLineError: the blocks can not be read on, after what was read.
    """
    with ExitStack() as stack:
        threads = stack.enter_context(ThreadPoolExecutor(workers))
        idle: SimpleQueue[_Worker] = SimpleQueue()
        start = pickle.dumps(settings)
        for _ in range(workers):  # entered after the threads: on an error, first the workers end
            idle.put(stack.enter_context(_Worker(start)))
        pending: deque[Future[tuple[Block, Encoded]]] = deque()
        stack.callback(lambda: [future.cancel() for future in pending])
        unreadable = None
        source = iter(blocks)
        while True:
            try:
                block = next(source, None)
            except BrokenLineError as error:  # a line before it may be broken too: that is first
                block, unreadable = None, error
            if block is None:
                break
            pending.append(threads.submit(_encode, idle, block))
            if len(pending) > 2 * workers + 1:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
        if unreadable is not None:
            raise unreadable


def _encode(idle: "SimpleQueue[_Worker]", block: Block) -> tuple[Block, Encoded]:
    worker = idle.get()  # at once, as there are as many workers as threads
    try:
        return block, worker.encode(block)
    finally:
        idle.put(worker)


class _Worker:
    """One process and the two pipes to it."""

    def __init__(self, settings: bytes) -> None:
        self._unsent = settings  # fits into no pipe: sent by a thread, else they start in turn
        self.process = subprocess.Popen(
            [sys.executable, "-c", f"from {main.__module__} import main; main()"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            pipesize=_PIPE_BYTES,
        )

    def encode(self, block: Block) -> Encoded:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            self.process.stdin.write(self._unsent)
            self._unsent = b""
            send(self.process.stdin, block.data)
            answer = receive(self.process.stdout)
        except (EOFError, BrokenPipeError) as error:
            raise WorkerDied(self._obituary(block)) from error
        if isinstance(answer, Exception):
            where = f"{block.path}:{block.start.line}-{block.end.line - 1}"
            kind = ValueError if isinstance(answer, ValueError) else RuntimeError
            raise kind(f"{where}: {answer}") from answer
        assert isinstance(answer, Encoded)
        return answer

    def _obituary(self, block: Block) -> str:
        code = self.process.wait(_WAIT_S)
        how = f"ended with exit code {code}"
        if code < 0:
            how = f"was killed by {signal.Signals(-code).name}"
        advice = " (a machine that runs out of memory does that)" if code == -signal.SIGKILL else ""
        return (
            f"{block.path}:{block.start.line}: the worker process that had lines "
            f"{block.start.line} to {block.end.line - 1} {how}{advice}; give the same command "
            "again, perhaps with fewer workers, and it goes on from what is finished"
        )

    def __enter__(self) -> "_Worker":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """End the process; it holds nothing that could be lost."""
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            with suppress(BrokenPipeError):  # of what a dead worker has not read
                pipe.close()
