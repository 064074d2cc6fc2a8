"""Trainings whose torchrun and ranks start fast; test_more_rows has them start as users' do."""

import sys
from collections.abc import Iterator

import pytest


@pytest.fixture(scope="module")
def ranks_start_fast(quick_ranks: dict[str, str]) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in quick_ranks.items():
            patch.setenv(name, value)
        patch.setattr(sys, "executable", quick_ranks["PYTHON_EXEC"])
        yield
