"""The worker processes: blocks go out to whoever is idle, results come back in order.

Processes and not threads, as taking ids out of the encoder and parsing JSON hold the interpreter
lock. The output does not depend on their number: results are handed on in the order of the blocks.
A worker that dies (killed, out of memory) closes its pipe and ends the run at once.

One of them is `serve`: raw lines in, token ids by domain out, as pickles through two pipes. It is
forked with an engine that is ready, which takes a second to load. The process ends when its input
does, so also when the process that feeds it is killed: no worker is ever left over.
"""

import fcntl
import os
import pickle
import signal
import traceback
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from queue import SimpleQueue
from typing import IO, Any, NamedTuple, NoReturn

import numpy as np
import numpy.typing as npt

from megatron_infoentropy.data import jsonl
from megatron_infoentropy.data.blocks import Block, BrokenLineError, Keys
from megatron_infoentropy.data.indexed import Integers, token_dtype
from megatron_infoentropy.data.manifest import PILE_DOMAIN, DataOptions
from megatron_infoentropy.data.tokenizer import Engine, LoadedTokenizer, end_documents


@dataclass(frozen=True)
class DomainPart:
    """The documents of one domain in a block, in order; `bytes` of UTF-8 text."""

    tokens: Integers  # [sum of lengths], in the dtype they are stored in
    lengths: npt.NDArray[np.int64]  # [documents]
    bytes: int


class Rejected(NamedTuple):
    """A line without a document: its number in the block from 0, why, and the domain if known."""

    line: int
    reason: str
    domain: str | None


@dataclass
class Encoded:
    """A block's documents by domain in order of appearance, and what was no document.

    The last `trailing_blanks` lines are blank: whether that is an error shows in the next block.
    """

    parts: dict[str, DomainPart] = field(default_factory=dict)
    rejected: list[Rejected] = field(default_factory=list)
    trailing_blanks: int = 0


@dataclass(frozen=True)
class Encoder:
    """Encodes blocks with one engine for a tokenizer.

    Unless documents are `named`, none may name a domain, as the first ones do not.
    """

    loaded: LoadedTokenizer
    options: DataOptions
    encode: Engine
    named: bool = True

    @property
    def keys(self) -> Keys:
        """Return where a document has what is asked of it."""
        return Keys(self.options.text_key, self.options.split_by if self.named else PILE_DOMAIN)

    def __call__(self, data: bytes, is_table: bool = False) -> Encoded:
        """Parse the lines or rows of a block and encode their texts."""
        texts: dict[str, list[str]] = {}
        sizes: Counter[str] = Counter()
        keys = self.keys
        lines = jsonl.rows_of(data, is_table)
        filled = len(lines)
        while filled and jsonl.is_blank(lines[filled - 1]):
            filled -= 1
        done = Encoded(trailing_blanks=len(lines) - filled)
        for number, raw in enumerate(lines[:filled]):
            try:
                if jsonl.is_blank(raw):
                    raise jsonl.BrokenRecordError(jsonl.BLANK)
                record = jsonl.parse(raw, keys, named=self.named)
            except jsonl.BrokenRecordError as error:
                done.rejected.append(Rejected(number, str(error), error.domain))
                continue
            name = jsonl.WHOLE if record.domain is None else record.domain
            texts.setdefault(name, []).append(record.text)
            sizes[name] += record.text_bytes
        done.parts = {name: self._part(texts[name], sizes[name]) for name in texts}
        return done

    def _part(self, texts: Sequence[str], size: int) -> DomainPart:
        tokens, lengths = self.encode(texts)
        if self.options.append_eod:
            tokens, lengths = end_documents(tokens, lengths, self.loaded.eod_id)
        # A cast to uint16 would silently wrap what does not fit.
        if tokens.size and tokens.max() >= self.loaded.vocab_size:
            raise ValueError(
                f"the tokenizer gave the id {tokens.max()}, its vocabulary of "
                f"{self.loaded.vocab_size} ends at {self.loaded.vocab_size - 1}: its ids have "
                "holes, renumber them"
            )
        dtype = token_dtype(self.loaded.vocab_size)
        return DomainPart(tokens.astype(dtype, copy=False), lengths, size)


def send(stream: IO[bytes], message: Any) -> None:
    """Write one message to a pipe."""
    pickle.dump(message, stream, protocol=5)
    stream.flush()


def receive(stream: IO[bytes]) -> Any:
    """Read one message from a pipe.

    Raises:
        EOFError: the process at the other end is gone.
    """
    try:
        return pickle.load(stream)
    except pickle.UnpicklingError as error:  # it died in the middle of a message
        raise EOFError(str(error)) from error


def serve(encode: Encoder, request: int, reply: int) -> NoReturn:
    """Be a worker: answer blocks from one pipe on another until the first one ends.

    An error is an answer too. All other files that the process had open when it was forked are
    closed: the ends of other workers' pipes, which else would not end, and the output's lock.
    """
    try:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that feeds this
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        open_here = {int(path.name) for path in Path("/dev/fd").iterdir()}
        for descriptor in open_here - {0, 1, 2, request, reply}:
            with suppress(OSError):  # that of the listing itself
                os.close(descriptor)
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # there is a worker per core already
        requests, replies = os.fdopen(request, "rb"), os.fdopen(reply, "wb")
        while True:
            block = receive(requests)
            try:
                answer: Encoded | Exception = encode(*block)
            except Exception as error:
                answer = error
            send(replies, answer)
    except (EOFError, BrokenPipeError):
        os._exit(0)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(1)  # nothing of the process that was forked may be done twice


_PIPE_BYTES = 1 << 20  # so that a block passes in one go; other systems than Linux have none


class WorkerDied(RuntimeError):
    """A worker process ended in the middle of its work; what was finished is kept."""


def encode_blocks(
    encoder: Encoder, blocks: Iterable[Block], *, workers: int
) -> Iterator[tuple[Block, Encoded]]:
    """Encode in `workers` processes; results in the order of the blocks, few of them in flight.

    Raises:
        WorkerDied: which lines it had, how it ended and what to do.
        BrokenLineError: the blocks can not be read on, after what was read.
    """
    with ExitStack() as stack:
        threads = stack.enter_context(ThreadPoolExecutor(workers))
        idle: SimpleQueue[_Worker] = SimpleQueue()
        for _ in range(workers):  # entered after the threads: on an error, first the workers end
            idle.put(stack.enter_context(closing(_Worker(encoder))))
        pending: deque[Future[tuple[Block, Encoded]]] = deque()
        stack.callback(lambda: [future.cancel() for future in pending])
        unreadable = None
        try:
            for block in blocks:
                pending.append(threads.submit(_encode, idle, block))
                if len(pending) > 2 * workers + 1:
                    yield pending.popleft().result()
        except BrokenLineError as error:  # a line before it may be broken too: that is first
            unreadable = error
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
    """One process and the two pipes to it; forked, as the encoder takes long to make."""

    def __init__(self, encoder: Encoder) -> None:
        request, requests = os.pipe()
        replies, reply = os.pipe()
        self._process: int | None = os.fork()
        if not self._process:
            serve(encoder, request, reply)
        os.close(request)
        os.close(reply)
        self._requests, self._replies = os.fdopen(requests, "wb"), os.fdopen(replies, "rb")
        for pipe in (requests, replies):
            with suppress(OSError, AttributeError):
                fcntl.fcntl(pipe, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)

    def encode(self, block: Block) -> Encoded:
        try:
            send(self._requests, (block.data, block.is_table))
            answer = receive(self._replies)
        except (EOFError, BrokenPipeError) as error:
            raise WorkerDied(self._why_it_ended(block)) from error
        if isinstance(answer, Exception):
            where = f"{block.path}:{block.start.line}-{block.end.line - 1}"
            kind = ValueError if isinstance(answer, ValueError) else RuntimeError
            raise kind(f"{where}: {answer}") from answer
        assert isinstance(answer, Encoded)
        return answer

    def _why_it_ended(self, block: Block) -> str:
        code = self._wait()
        how = f"ended with exit code {code}"
        if code < 0:
            how = f"was killed by {signal.Signals(-code).name}"
        advice = " (a machine that runs out of memory does that)" if code == -signal.SIGKILL else ""
        return (
            f"{block.path}:{block.start.line}: the worker process that had lines "
            f"{block.start.line} to {block.end.line - 1} {how}{advice}; give the same command "
            "again, perhaps with fewer workers, and it goes on from what is finished"
        )

    def _wait(self) -> int:
        assert self._process is not None
        code = os.waitstatus_to_exitcode(os.waitpid(self._process, 0)[1])
        self._process = None
        return code

    def close(self) -> None:
        """End the process; it holds nothing that could be lost."""
        if self._process is not None:
            os.kill(self._process, signal.SIGKILL)
            self._wait()
        for pipe in (self._requests, self._replies):
            with suppress(BrokenPipeError):  # of what a dead worker has not read
                pipe.close()
