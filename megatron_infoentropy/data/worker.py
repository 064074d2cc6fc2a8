"""One worker process: blocks of raw lines in, token ids by domain out.

    main() < settings, blocks > results

Messages are pickles on the standard streams. The process ends when its input does, so also when the
process that feeds it is killed: no worker is ever left over.
"""

import os
import pickle
import signal
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import IO, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from megatron_infoentropy.data import jsonl
from megatron_infoentropy.data.engine import Engine, end_documents, hf_engine
from megatron_infoentropy.data.fast_engine import fast_engine
from megatron_infoentropy.data.indexed import Integers, token_dtype
from megatron_infoentropy.data.options import PILE_DOMAIN, Options
from megatron_infoentropy.data.tokenizer import LoadedTokenizer


@dataclass(frozen=True)
class Settings:
    """What a worker is told at its start."""

    loaded: LoadedTokenizer
    options: Options
    engine: str = "hf"  # or "gigatoken"
    named: bool = True  # else no document may name a domain, as the first ones do not


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

    def __init__(self, settings: Settings) -> None:
        self.options = settings.options
        self.loaded = settings.loaded
        self.dtype = token_dtype(self.loaded.vocab_size)
        self.encode = _engine(settings, self.loaded)
        self._named = settings.named
        self._keys = jsonl.split_key(self.options.split_by if self._named else PILE_DOMAIN)

    def __call__(self, data: bytes) -> Encoded:
        """Parse the lines of a block and encode their texts."""
        texts: dict[str, list[str]] = {}
        sizes: Counter[str] = Counter()
        lines = jsonl.lines_of(data)
        filled = len(lines)
        while filled and jsonl.is_blank(lines[filled - 1]):
            filled -= 1
        done = Encoded(trailing_blanks=len(lines) - filled)
        for number, raw in enumerate(lines[:filled]):
            try:
                if jsonl.is_blank(raw):
                    raise jsonl.BrokenRecordError(jsonl.BLANK)
                record = jsonl.parse_line(raw, self.options.text_key, self._keys, named=self._named)
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


def _engine(settings: Settings, loaded: LoadedTokenizer) -> Engine:
    special_tokens = settings.options.special_tokens
    if settings.engine == "gigatoken":
        return fast_engine(loaded, special_tokens=special_tokens)
    return hf_engine(loaded, special_tokens=special_tokens)


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
            data = receive(requests)
            try:
                answer: Encoded | Exception = encode(data)
            except Exception as error:
                answer = error
            send(replies, answer)
    except (EOFError, BrokenPipeError):
        os._exit(0)  # the output can not be flushed any more
