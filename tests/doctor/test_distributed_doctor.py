"""Ranks that look at each other: two of them for real, and every fault told from facts alone."""

from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
from ranks import run_ranks

from megatron_infoentropy.doctor.collectives import (
    Measured,
    Transfer,
    clock_ahead_s,
    measure,
    members,
)
from megatron_infoentropy.doctor.data_files import DataFacts, Share, look
from megatron_infoentropy.doctor.facts import Facts, Place
from megatron_infoentropy.doctor.job import RankMissing, arrive, wait_for_all
from megatron_infoentropy.doctor.report import Report
from megatron_infoentropy.doctor.verdict import DISK_BYTES, troubles

GIB = 2**30
DATA = DataFacts("a", "m", opened=12, compared=4, compared_bytes=3_400_000, problems=[])
HEALTHY = [
    Facts(rank, f"host{rank}", "NVIDIA H200", 80 * GIB, 100 * GIB, {"torch": "2.15.0"}, DATA, "a")
    for rank in range(3)
]


def with_fault(**changes):
    return [*HEALTHY[:2], replace(HEALTHY[2], **changes)]


def test_healthy_ranks_have_no_troubles():
    assert troubles(HEALTHY, [], memory_needed=70 * GIB) == []


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"versions": {"torch": "2.14.0"}}, "torch 2.14.0, elsewhere 2.15.0: install the same"),
        ({"device": "NVIDIA A100"}, "device NVIDIA A100, elsewhere NVIDIA H200"),
        ({"clock_s": -7.5}, "its clock is 7.5 s behind rank 0's: synchronise"),
        ({"disk": DISK_BYTES - 1}, "free for the run folder, wanted are 20.0: make room"),
        ({"tokenizer": "b"}, "made with another tokenizer (SHA-256 a..., here SHA-256 b...)"),
        ({"data": replace(DATA, manifests="n")}, "data with the manifests n, elsewhere m"),
        ({"memory": 71 * GIB}, "71.0 GiB of memory are free, the recipe takes 70.0"),
        ({"problems": ("no file",)}, "no file"),
    ],
)
def test_every_fault_is_one_sentence_that_names_the_rank(changes, said):
    found = troubles(with_fault(**changes), [], memory_needed=70 * GIB)
    assert len(found) == 1
    assert found[0].startswith("rank 2 (host2): ")
    assert said in found[0]


def test_wrong_results_of_a_collective_are_a_trouble():
    broken = Measured(Transfer("gradients", "all-reduce", 8, 3), 0.1, 1.0, (1,))
    assert "gradients: wrong results on ranks 1: " in troubles(HEALTHY, [broken])[0]


def two_ranks():
    import time

    import torch
    import torch.distributed as dist

    rank = dist.get_rank()
    clock = time.time if rank == 0 else lambda: time.time() + 5
    ahead = clock_ahead_s(rank, 2, clock)
    transfers = [Transfer("r", "all-reduce", 4096, 2), Transfer("g", "all-gather", 4096, 2)]
    measured = measure(transfers, torch.device("cpu"))
    return ahead, [(m.wrong_ranks, m.gbps > 0) for m in measured]


def test_two_ranks_measure_a_skewed_clock_and_right_collectives():
    (zero, first), (ahead, second) = run_ranks(two_ranks, 2)
    assert zero == 0
    assert ahead == pytest.approx(5, abs=0.5)
    assert first == second == [((), True), ((), True)]


@pytest.mark.parametrize("ranks", [2, 183, 4096])
def test_sums_over_many_ranks_are_exact_in_float32(ranks):
    import torch

    from megatron_infoentropy.doctor.collectives import _numbers

    pattern, factors = _numbers(3000, ranks, torch.device("cpu"))
    assert len(set(factors)) > 1
    total = torch.zeros_like(pattern)
    for factor in factors:
        total += pattern * factor
    assert torch.equal(total, pattern * sum(factors))
    assert torch.equal(total.double(), pattern.double() * sum(factors))


def test_a_rank_with_little_to_read_waits_for_one_with_much():
    from concurrent.futures import ThreadPoolExecutor

    from torch.distributed import DistStoreError, TCPStore

    store = TCPStore("127.0.0.1", 0, 2, True, timedelta(seconds=0.1), wait_for_workers=False)
    first, second = Place(0, 2, 0, 2), Place(1, 2, 1, 2)
    with pytest.raises(DistStoreError):
        wait_for_all(store, first, timedelta(seconds=0.2))
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(wait_for_all, store, first, timedelta(seconds=60))
        with pytest.raises(TimeoutError):
            waiting.result(timeout=0.5)  # longer than the store's own patience
        other = TCPStore("127.0.0.1", store.port, 2, False, wait_for_workers=False)
        wait_for_all(other, second, timedelta(seconds=60))
        waiting.result(timeout=60)


def test_a_rank_that_does_not_come_is_named_with_its_host():
    from torch.distributed import TCPStore

    store = TCPStore("127.0.0.1", 0, 4, True, timedelta(seconds=5), wait_for_workers=False)
    store.set("doctor/2", "b")
    with pytest.raises(RankMissing) as missing:
        arrive(store, Place(0, 4, 0, 2), 0.3)
    said = str(missing.value)
    assert "rank 1 (node 0, " in said
    assert "rank 3 (node 1, b) did not come within 0.3 s; 2 of 4 are there" in said


def test_groups_are_those_that_megatron_makes_of_its_world():
    assert members(2, 1, 8) == [[0, 1], [2, 3], [4, 5], [6, 7]]  # tensor parallel 2
    assert members(2, 2, 8) == [[0, 2], [1, 3], [4, 6], [5, 7]]  # its data parallel, 2 stages


LOSS = Measured(Transfer("loss", "all-gather", 2**19, 2), 0.002, 0.25, ())
REPORT = Report(HEALTHY, [LOSS], 70 * GIB, Path("tokenizer"), Path("run"), 20 * GIB, [])


def test_every_line_says_what_was_looked_at():
    lines = REPORT.lines()
    rank = ["2", "host2", "NVIDIA", "H200", "80.0", "GiB", "100.0", "GiB", "+0.0", "ms"]
    assert lines[3].split() == rank
    for said in (
        "versions   torch 2.15.0",
        "memory     a rank takes 70.0 GiB by the recipe, 80.0 GiB are free",
        "disk       20.0 GiB are wanted for run, 100.0 GiB are free",
        "data       12 files, opened by every rank; 12 checksums compared, 10.2 MB",
        "tokenizer  SHA-256 a..., that of the data",
        "loss       all-gather of 0.5 MiB over 2 ranks: 2.0 ms, 0.25 GB/s, results right",
        "ok  3 ranks can work together",
    ):
        assert said in lines
    without = [replace(one, data=None, tokenizer="") for one in HEALTHY]
    lines = Report(without, [], None, None, Path("run"), 20 * GIB, ["one", "two"]).lines()
    for said in (
        "memory     not counted: no RECIPE that can be trained",
        "data       not looked at: name --data",
        "tokenizer  not looked at: name --tokenizer",
    ):
        assert said in lines
    assert lines[-3:] == ["!!  one", "!!  two", "2 troubles: mend before the training"]


def test_what_could_not_be_read_is_not_called_old_or_not_ordered(tmp_path):
    nothing = look(tmp_path / "nope", Share())
    unread = replace(REPORT, facts=with_fault(data=nothing, tokenizer="")).lines()
    assert "data       1 of 3 ranks could open none of its files" in unread
    assert "tokenizer  1 of 3 ranks could not read it" in unread
    old = replace(REPORT, facts=[replace(HEALTHY[0], data=replace(DATA, compared=0))]).lines()
    assert any("12 files, opened by every rank; no checksums: their manifests" in o for o in old)
