"""Where the ranks of one start find each other in a store that outlives it.

torchrun serves one store to all restarts of a training, and each of its agents counts only the
restarts that its own ranks caused: no count is the same on all nodes. So rank 0 makes a name for
this start and hands it to everyone who has come: hello/RANK -> visitor, visitor -> start.
"""

import time
from uuid import uuid4

from torch.distributed import PrefixStore, Store  # type: ignore[attr-defined]

PAUSE = 0.02  # seconds between rank 0's looks


def meet(store: Store, rank: int, ranks: int) -> Store:
    """The part of the store that only this start's ranks know; every rank calls this.

    Raises:
        TimeoutError: on rank 0, a rank did not come within the store's timeout.
        torch.distributed.DistStoreError: on another rank, rank 0 did not.
    """
    start = _receive(store, ranks) if rank == 0 else _visit(store, rank)
    return PrefixStore(start, store)


def _visit(store: Store, rank: int) -> str:
    visitor = uuid4().hex
    store.set(f"hello/{rank}", visitor)
    start: str = store.get(visitor).decode()
    store.set(f"{start}/here/{rank}", "")
    return start


def _receive(store: Store, ranks: int) -> str:
    """On rank 0: tell all until all are here; a visitor of an earlier start never answers."""
    start = uuid4().hex
    told: dict[int, bytes] = {}
    missing = list(range(1, ranks))
    longest = store.timeout  # type: ignore[attr-defined]
    end = time.monotonic() + longest.total_seconds()
    while missing:
        for rank in missing:
            if store.check([f"hello/{rank}"]):
                visitor = store.get(f"hello/{rank}")
                if told.get(rank) != visitor:
                    store.set(visitor.decode(), start)
                    told[rank] = visitor
        missing = [rank for rank in missing if not store.check([f"{start}/here/{rank}"])]
        if missing and time.monotonic() > end:
            raise TimeoutError(
                f"ranks {missing} did not come to verify the checkpoint within {longest}: "
                "look for the first error in their logs"
            )
        time.sleep(PAUSE * bool(missing))
    return start
