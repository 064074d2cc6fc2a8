"""Children of a rank that is killed: a forked one and a spawned one, of a module run as `-m`."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

RANK = """
import multiprocessing, os, time
from megatron_infoentropy.runtime import orphans

if __name__ == "__mp_main__":
    orphans.end_with(os.getppid())

def sleep():
    print("child", os.getpid(), flush=True)
    time.sleep(600)

if __name__ == "__main__":
    orphans.leave_none()
    process = multiprocessing.get_context("METHOD").Process(target=sleep)
    process.start()
    process.join()
"""


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_child_ends_with_a_rank_that_is_killed(tmp_path, method):
    (tmp_path / "rank.py").write_text(RANK.replace("METHOD", method))
    root = str(Path(__file__).parents[2])
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{root}"}
    rank = subprocess.Popen(
        [sys.executable, "-m", "rank"], stdout=subprocess.PIPE, env=environment, text=True
    )
    child = int(rank.stdout.readline().split()[1])
    assert Path(f"/proc/{child}").exists()
    rank.send_signal(signal.SIGKILL)
    # The pipe closes when nobody is left to write into it: a reader of the log does not wait.
    rest, _ = rank.communicate(timeout=60)
    assert rest == ""
    for _ in range(50):
        if not Path(f"/proc/{child}").exists() or "Z" in state_of(child):
            return
        time.sleep(0.1)
    raise AssertionError("the child has outlived its parent")


def state_of(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2]
    except FileNotFoundError:
        return "Z"
