"""What every test needs: two threads, and a named skip where there is no GPU.

--outcomes FILE keeps a row a test, with where and when, and leaves out those that the file has, but
for failed ones: a run that was cut goes on.
"""

import csv
import gc
import os
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

# Before torch: by default a thread that waits for the others turns in circles, on a core that
# another test needs.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest
import torch
from launch import serve_ranks

from megatron_infoentropy.bench.results import provenance
from megatron_infoentropy.files import work_folder, write_whole

torch.set_num_threads(2)
HEADS = ("test", "outcome", "seconds")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--outcomes", type=Path, help="CSV file of outcomes to go on with")


def pytest_configure(config: pytest.Config) -> None:
    path = config.getoption("--outcomes")
    if path and not hasattr(config, "workerinput"):  # with xdist the controller hears of all
        config.pluginmanager.register(Outcomes(path))


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Nothing imported here becomes garbage, and to look through all of it takes half a second."""
    gc.disable()
    collected = yield
    gc.enable()
    gc.freeze()
    return collected


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests that need GPUs skip, by name, where there are none."""
    for item in items:
        for marker, needed in (("gpu", 1), ("multi_gpu", 2)):
            if item.get_closest_marker(marker) and torch.cuda.device_count() < needed:
                item.add_marker(pytest.mark.skip(reason=f"needs {needed} CUDA device(s)"))
    if path := config.getoption("--outcomes"):
        known = known_tests(path)
        config.hook.pytest_deselected(items=[item for item in items if item.nodeid in known])
        items[:] = [item for item in items if item.nodeid not in known]


def pytest_unconfigure() -> None:
    gc.unfreeze()  # libraries complain at the end of what was not freed


threads_left = 0  # by the last collection


def pytest_runtest_logfinish() -> None:
    """Free process groups that only cycles hold, once they have added a hundred threads.

    A thread of each wakes 100 times a second, and there were up to 881 threads in a process.
    """
    global threads_left
    tasks = Path("/proc/self/task")
    if len(list(tasks.iterdir())) > threads_left + 100:
        gc.collect()
        threads_left = len(list(tasks.iterdir()))


@pytest.fixture(scope="session")
def quick_ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Environment variables with which torchrun's ranks need not import Megatron."""
    with serve_ranks(tmp_path_factory.mktemp("ranks")) as environment:
        yield environment


@pytest.fixture
def let_another_be_first(monkeypatch: pytest.MonkeyPatch) -> Callable[[ModuleType], None]:
    """Have another run make a module's output, a.bin, just before its `work_folder` is locked."""

    @contextmanager
    def late(output: Path) -> Iterator[Path]:
        write_whole(output / "a.bin", "other")
        with work_folder(output) as work:
            yield work

    return lambda module: monkeypatch.setattr(module, "work_folder", late)


def known_tests(path: Path) -> set[str]:
    """Those whose outcome a file has; failed ones are to be run again."""
    if not path.exists():
        return set()
    with path.open(newline="", encoding="utf-8") as file:
        last = {row["test"]: row["outcome"] for row in csv.DictReader(file)}
    return {test for test, outcome in last.items() if outcome != "failed"}


class Outcomes:
    """Appends a row as soon as a test has ended."""

    def __init__(self, path: Path) -> None:
        self._path, self._facts = path, provenance()
        if not path.exists():
            self._append([*HEADS, *self._facts])

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.outcome != "passed":
            row = (report.nodeid, report.outcome, f"{report.duration:.1f}")
            self._append([*row, *self._facts.values()])

    def _append(self, row: list[str]) -> None:
        with self._path.open("a", newline="", encoding="utf-8") as file:
            csv.writer(file, lineterminator="\n").writerow(row)
