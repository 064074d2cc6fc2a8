"""Who is left when a rank is killed, or its torchrun, or who has started that."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from process_tree import has_ended, wait_until

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
    assert has_ended(child)


# A rank that hears no signal, as one that waits for its GPU; a torchrun of a few lines.
DEAF_RANK = """
import pathlib, signal, sys, time
from megatron_infoentropy.runtime.orphans import leave_none
signal.signal(signal.SIGTERM, signal.SIG_IGN)
while (run / "is late").exists():
    time.sleep(0.05)
leave_none()
(run / "begun").touch()
time.sleep(600)
"""
TORCHRUN = """
import subprocess, sys
code = f"import pathlib\\nrun = pathlib.Path({sys.argv[1]!r})\\n" + sys.argv[2]
rank = subprocess.Popen([sys.executable, "-c", code], start_new_session=True)
print("rank", rank.pid, flush=True)
rank.wait()
"""
TRAINING = """
import sys
from pathlib import Path
from megatron_infoentropy.launch.train import follow
run, torchrun, rank = sys.argv[1:]
follow(Path(run), [sys.executable, "-c", torchrun, run, rank], {})
"""


@pytest.mark.parametrize("is_late", [False, True])
@pytest.mark.parametrize("victim", ["training", "torchrun"])
def test_a_rank_ends_with_a_training_or_a_torchrun_that_is_killed(tmp_path, victim, is_late):
    """Also one that begins only then: torchrun may not know of it yet, and cannot end it."""
    if is_late:
        (tmp_path / "is late").touch()
    words = [sys.executable, "-c", TRAINING, tmp_path, TORCHRUN, DEAF_RANK]
    training = subprocess.Popen(words, stderr=subprocess.DEVNULL)
    log = tmp_path / "train.log"
    wait_until(lambda: log.exists() and log.read_text().endswith("\n"))
    rank = int(log.read_text().split()[1])
    if not is_late:
        wait_until((tmp_path / "begun").exists)
    torchrun = int(Path(f"/proc/{rank}/stat").read_text().split()[3])
    os.kill(training.pid if victim == "training" else torchrun, signal.SIGKILL)
    assert has_ended(torchrun)
    (tmp_path / "is late").unlink(missing_ok=True)
    training.wait(timeout=60)
    assert has_ended(rank)


BEGINS = "from megatron_infoentropy.runtime.orphans import leave_none; leave_none(); print('begun')"


@pytest.mark.parametrize(("is_running", "said"), [(True, "begun\n"), (False, "")])
def test_a_rank_may_have_another_program_than_torchrun_for_a_parent(is_running, said):
    """What PYTHON_EXEC names, say; but not where torchrun is gone."""
    gone = subprocess.Popen(["true"])
    gone.wait()
    environment = os.environ | {
        "INFOENTROPY_TORCHRUN": str(os.getpid() if is_running else gone.pid)
    }
    words = ["sh", "-c", '"$@"; true', "sh", sys.executable, "-c", BEGINS]
    rank = subprocess.run(words, env=environment, capture_output=True, text=True)
    assert rank.stdout == said, rank.stderr
