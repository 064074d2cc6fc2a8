"""The worker processes: blocks go out to whoever is idle, results come back in order.

Processes and not threads, as taking ids out of the encoder and parsing JSON hold the interpreter
lock. The output does not depend on their number: results are handed on in the order of the blocks.
A worker that dies (killed, out of memory) closes its pipe and ends the run at once.

One of them is `main() < settings, blocks > results`: raw lines in, token ids by domain out. The
messages are pickles on the standard streams. The process ends when its input does, so also when the
process that feeds it is killed: no worker is ever left over.
"""

import fcntl
import os
import pickle
import signal
import subprocess
import sys
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import IO, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from megatron_infoentropy.data import jsonl
from megatron_infoentropy.data.blocks import Block, BrokenLineError, Keys
from megatron_infoentropy.data.fast_engine import fast_engine
from megatron_infoentropy.data.indexed import Integers, token_dtype
from megatron_infoentropy.data.manifest import AUTO, PILE_DOMAIN, DataOptions
from megatron_infoentropy.data.tokenizer import LoadedTokenizer, end_documents, hf_engine


@dataclass(frozen=True)
class WorkerSettings:
    """The message that a worker gets at its start."""

    loaded: LoadedTokenizer
    options: DataOptions
    engine: str  # hf or gigatoken

    @property
    def keys(self) -> Keys:
        """Return where a document has what is asked of it."""
        if self.options.split_by == AUTO:
            return Keys(self.options.text_key, PILE_DOMAIN, is_domain_required=False)
        return Keys(self.options.text_key, self.options.split_by)


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


class Encoder:
    """Encodes blocks with one tokenizer; as a class, since its engine takes long to start."""

    def __init__(self, settings: WorkerSettings) -> None:
        self.options = settings.options
        self.loaded = settings.loaded
        self.dtype = token_dtype(self.loaded.vocab_size)
        engine = {"hf": hf_engine, "gigatoken": fast_engine}[settings.engine]
        self.encode = engine(self.loaded, special_tokens=self.options.special_tokens)
        self._keys = settings.keys

    def __call__(self, data: bytes, is_table: bool = False) -> Encoded:
        """Parse the lines or rows of a block and encode their texts."""
        texts: dict[str, list[str]] = {}
        sizes: Counter[str] = Counter()
        lines = jsonl.rows_of(data, is_table)
        filled = len(lines)
        while filled and jsonl.is_blank(lines[filled - 1]):
            filled -= 1
        done = Encoded(trailing_blanks=len(lines) - filled)
        for number, raw in enumerate(lines[:filled]):
            try:
                if jsonl.is_blank(raw):
                    raise jsonl.BrokenRecordError(jsonl.BLANK)
                record = jsonl.parse(raw, self._keys)
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
        return DomainPart(tokens.astype(self.dtype, copy=False), lengths, size)


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


def main() -> None:
    """Answer blocks until the input ends; an error is an answer too."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that feeds this one
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # there is a worker per core already
    requests, replies = sys.stdin.buffer, sys.stdout.buffer
    try:
        encode = Encoder(receive(requests))
        while True:
            block = receive(requests)
            try:
                answer: Encoded | Exception = encode(*block)
            except Exception as error:
                answer = error
            send(replies, answer)
    except (EOFError, BrokenPipeError):
        os._exit(0)  # the output can not be flushed any more


def python_for(main: Callable[[], None]) -> list[str]:
    """Return the command of a Python that calls this function.

    It imports nothing from the folder it is started in, whose tokenize.py, say, may be a user's.
    """
    return [sys.executable, "-P", "-c", f"from {main.__module__} import main; main()"]


_PIPE_BYTES = 1 << 20  # so that a block passes in one go
_WAIT_S = 5


class WorkerDied(RuntimeError):
    """A worker process ended in the middle of its work; what was finished is kept."""


def encode_blocks(
    settings: WorkerSettings, blocks: Iterable[Block], *, workers: int
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
            idle.put(stack.enter_context(closing(_Worker(start))))
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
    """One process and the two pipes to it."""

    def __init__(self, settings: bytes) -> None:
        self._unsent = settings  # fits into no pipe: sent by a thread, else they start in turn
        self.process = subprocess.Popen(
            python_for(main), stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            # Only Linux has such, and no user more than 64 MiB of them: else it takes longer.
            with suppress(AttributeError, OSError):
                fcntl.fcntl(pipe, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)

    def encode(self, block: Block) -> Encoded:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            self.process.stdin.write(self._unsent)
            self._unsent = b""
            send(self.process.stdin, (block.data, block.is_table))
            answer = receive(self.process.stdout)
        except (EOFError, BrokenPipeError) as error:
            raise WorkerDied(self._why_it_ended(block)) from error
        if isinstance(answer, Exception):
            where = f"{block.path}:{block.start.line}-{block.end.line - 1}"
            kind = ValueError if isinstance(answer, ValueError) else RuntimeError
            raise kind(f"{where}: {answer}") from answer
        assert isinstance(answer, Encoded)
        return answer

    def _why_it_ended(self, block: Block) -> str:
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

    def close(self) -> None:
        """End the process; it holds nothing that could be lost."""
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            with suppress(BrokenPipeError):  # of what a dead worker has not read
                pipe.close()
