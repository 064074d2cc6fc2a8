"""Ranks that verify a checkpoint together, in a store that earlier starts have written to."""

from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
from saved import ours
from torch.distributed import HashStore, TCPStore

from megatron_infoentropy.checkpoints.choice import DamagedCheckpointError
from megatron_infoentropy.integration import checkpoints
from megatron_infoentropy.integration.meeting import meet


@pytest.fixture(params=["hash", "tcp"])
def store(request):
    store = HashStore() if request.param == "hash" else TCPStore("127.0.0.1", 0, None, True)
    store.set_timeout(timedelta(seconds=20))
    return store


def client(store):
    """As each rank has one of its own: a TCP store's client serves one caller at a time."""
    if isinstance(store, HashStore):
        return store
    return TCPStore("127.0.0.1", store.port, None, False, timedelta(seconds=20))


def start(store, order, ranks=3):
    """One start of the training: what rank 0 hears when it has given this order."""

    def rank_zero():
        mine = meet(client(store), 0, ranks)
        mine.set("order", order)
        return [mine.get(f"answer/{rank}") for rank in range(1, ranks)]

    def follower(rank):
        mine = meet(client(store), rank, ranks)
        mine.set(f"answer/{rank}", mine.get("order") + f" {rank}".encode())

    with ThreadPoolExecutor(ranks) as pool:
        followers = [pool.submit(follower, rank) for rank in range(1, ranks)]
        answers = pool.submit(rank_zero).result()
        assert all(done.result() is None for done in followers)
    return answers


def test_ranks_meet_anew_at_every_start_in_the_same_store(store):
    for order in ("first", "second"):
        assert start(store, order) == [f"{order} {rank}".encode() for rank in (1, 2)]


def test_a_rank_that_came_and_died_is_replaced_by_the_one_that_comes_again(store):
    store.set("hello/1", "a visitor that died")
    with ThreadPoolExecutor(2) as pool:
        rank_zero = pool.submit(meet, client(store), 0, 2)
        store.get("a visitor that died")  # rank 0 has told it, and waits
        follower = pool.submit(meet, client(store), 1, 2).result()
        follower.set("word", "here")
        assert rank_zero.result().get("word") == b"here"


def test_rank_0_names_the_ranks_that_do_not_come(store):
    store.set_timeout(timedelta(seconds=0.1))
    store.set("hello/1", "a visitor that died")
    with pytest.raises(TimeoutError, match=r"ranks \[1, 2\] did not come"):
        meet(store, 0, 3)


def test_a_restart_remembers_nothing_that_was_found_before_it(monkeypatch, tmp_path):
    shared, flags = HashStore(), checkpoints.checkpoint_flags([f"--load={ours(tmp_path, 10)}"])
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(checkpoints, "LONGEST_WAIT", timedelta(seconds=20))

    def both():
        places = iter([(shared, 0, 2), (shared, 1, 2)])
        monkeypatch.setattr(checkpoints, "rendezvous", lambda _: iter([next(places)]))
        with ThreadPoolExecutor(2) as pool:
            return [pool.submit(checkpoints.choose_checkpoint, flags) for _ in range(2)]

    assert [rank.result() for rank in both()] == [None, None]
    (tmp_path / "iter_0000010" / "__0_0.distcp").write_bytes(b"?")
    for rank in both():
        with pytest.raises(DamagedCheckpointError, match="distcp has 1 bytes"):
            rank.result()
