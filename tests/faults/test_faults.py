"""What happens to a training that is killed, damaged, held up or starved of disk.

Each once; `make faults` kills and cuts off dozens of times, on real servers.
"""

import os
import subprocess

import faulty_run
import pytest
from ranks_to_kill import RANKS, SAVE_INTERVAL, Training, run_to_end
from trials import check, complete_iterations

from megatron_infoentropy.launch.failures import explain


@pytest.fixture(scope="module")
def losses(tmp_path_factory):
    """Of the training that nothing happens to."""
    folder = tmp_path_factory.mktemp("undisturbed")
    return run_to_end(folder / "ranks", folder / "save").losses


def test_killed_damaged_and_cut_off_it_ends_as_if_nothing_had_happened(losses, tmp_path):
    save = tmp_path / "save"
    with Training(tmp_path / "killed", save) as training:
        assert training.until(f"saving checkpoint at iteration {2 * SAVE_INTERVAL:7d}")
        training.kill(1)
    check(training, 0, losses)
    complete = complete_iterations(save)
    assert SAVE_INTERVAL in complete
    check(run_to_end(tmp_path / "again", save), complete[-1], losses)
    *_, before, newest = complete_iterations(save)
    path = save / f"iter_{newest:07d}" / "__1_0.distcp"
    size = path.stat().st_size
    os.truncate(path, size - 100)
    training = run_to_end(tmp_path / "cut off", save)
    check(training, before, losses)
    assert f"{path} has {size - 100} bytes, not {size}: training goes on" in training.log(0)
    assert complete_iterations(save)[-1] == newest  # saved anew


def test_a_late_rank_changes_nothing_and_nan_in_one_rank_stops_all(losses, tmp_path):
    with Training(tmp_path / "ranks", tmp_path / "save", entry=faulty_run.main) as training:
        codes = training.wait()
    assert 0 not in codes
    check(training, 0, losses)
    assert max(training.losses) == faulty_run.BROKEN - 1
    reason = explain(training.log(0) + training.log(1))
    assert reason.startswith("the loss of a rank became NaN or infinite")
    rank, iteration = faulty_run.FAULTY_RANK, faulty_run.BROKEN
    assert f"rank {rank}: the loss is NaN at iteration {iteration}, training stops" in training.log(
        1
    )
    # Megatron saves the state before the step that failed, so that it can be tried again.
    assert complete_iterations(tmp_path / "save") == [4, faulty_run.BROKEN - 1]


@pytest.fixture
def small_disk(tmp_path):
    """A folder that is a file system of its own, with room for two checkpoints and a bit."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1100k", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True).returncode != 0:
        pytest.skip("needs the right to mount a tmpfs")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_disk_that_fills_up_costs_no_complete_checkpoint(losses, tmp_path, small_disk):
    save = small_disk / "save"
    with Training(tmp_path / "full", save) as training:
        codes = training.wait()
    assert codes != [0] * RANKS
    check(training, 0, losses)
    reason = explain(training.log(0) + training.log(1))
    assert reason.startswith("a disk is full: make room where the run folder")
    complete = complete_iterations(save)
    assert complete
    subprocess.run(["mount", "-o", "remount,size=64m", str(small_disk)], check=True)
    check(run_to_end(tmp_path / "room", save), complete[-1], losses)
