"""Documents to token ids: batches by domain, encoded in threads, results in order.

The encoder releases the interpreter lock, so threads use as many cores as there are workers. What
is in a batch depends on the input alone and results come in the order the batches were read, so the
output does not depend on the number of workers.
"""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

import numpy as np
import numpy.typing as npt

from megatron_infoentropy.data.jsonl import read_jsonl
from megatron_infoentropy.data.tokenizer import LoadedTokenizer

WHOLE = "all"  # the domain's name where texts are not split
_PARALLELISM = "TOKENIZERS_PARALLELISM"
_BATCH_BYTES = 1 << 19
_BATCH_DOCUMENTS = 512


@dataclass
class Batch:
    """Some documents of one domain in the order they were read; `bytes` of UTF-8 text."""

    domain: str
    texts: list[str] = field(default_factory=list)
    bytes: int = 0


@dataclass(frozen=True)
class Encoded:
    """The ids of a batch in a row, int64 [tokens], and how many each document has [documents]."""

    batch: Batch
    tokens: npt.NDArray[np.int64]
    lengths: npt.NDArray[np.int64]


def read_batches(
    inputs: Sequence[Path], split_by: str | None, advance: Callable[[int], None]
) -> Iterator[Batch]:
    """Group documents by domain: enough at a time to keep a worker busy, little to hold."""
    filling: dict[str, Batch] = {}
    for path in inputs:
        for record in read_jsonl(path, domain_key=split_by, advance=advance):
            name = WHOLE if record.domain is None else record.domain
            batch = filling.setdefault(name, Batch(name))
            batch.texts.append(record.text)
            batch.bytes += record.text_bytes
            if batch.bytes >= _BATCH_BYTES or len(batch.texts) >= _BATCH_DOCUMENTS:
                yield filling.pop(name)
    yield from filling.values()


def encode_batches(
    loaded: LoadedTokenizer, batches: Iterable[Batch], *, append_eod: bool, workers: int
) -> Iterator[Encoded]:
    """Encode in `workers` threads; results in the order of the batches, few of them in flight."""
    pending: deque[Future[Encoded]] = deque()
    with _one_thread_per_call(), ThreadPoolExecutor(workers) as pool:
        for batch in batches:
            pending.append(pool.submit(_encode, loaded, batch, append_eod))
            if len(pending) > 2 * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


def _encode(loaded: LoadedTokenizer, batch: Batch, append_eod: bool) -> Encoded:
    ids = [encoding.ids for encoding in loaded.tokenizer.encode_batch_fast(batch.texts)]
    if append_eod:
        for document in ids:
            if document:
                document.append(loaded.eod_id)
    lengths = np.array([len(document) for document in ids], dtype=np.int64)
    tokens = np.fromiter(chain.from_iterable(ids), dtype=np.int64, count=lengths.sum())
    return Encoded(batch, tokens, lengths)


@contextmanager
def _one_thread_per_call() -> Iterator[None]:
    """Keep `tokenizers` from starting threads of its own beside the workers."""
    before = os.environ.get(_PARALLELISM)
    os.environ[_PARALLELISM] = "false"
    try:
        yield
    finally:
        del os.environ[_PARALLELISM]
        if before is not None:
            os.environ[_PARALLELISM] = before
