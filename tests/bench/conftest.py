"""A group of one for what wants a process group, and a case small enough to measure in a test."""

from itertools import pairwise

import pytest
import torch
import torch.distributed as dist

from megatron_infoentropy.bench.cases import Case
from megatron_infoentropy.bench.providers import Setting


@pytest.fixture(scope="module")  # a process that is a rank cannot do all that others can
def group(tmp_path_factory):
    store = tmp_path_factory.mktemp("group") / "store"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def setting(group):
    return Setting(Case(12, 70), torch.device("cpu"), group, compiled=False)


class CountingClock:
    """Time passes by `tick` alone."""

    name = "counting"

    def __init__(self):
        self.now = 0.0

    def tick(self, ms):
        self.now += ms

    def start(self):
        self.marks = [self.now]

    def mark(self):
        self.marks.append(self.now)

    def read(self):
        return [after - before for before, after in pairwise(self.marks)]


@pytest.fixture
def clock():
    return CountingClock()


@pytest.fixture
def facts():
    return {
        "device": "Example CPU, 2 cores",
        "torch": "2.15.0",
        "triton": "",
        "megatron_core": "0.19.2",
        "commit": "abcdef0",
        "date": "2026-11-23",
    }
