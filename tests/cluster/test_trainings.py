"""Trainings on two machines, under a real Slurm and by a real ssh, that are stopped and go on.

Only how the ranks start is not as users have it: they are forks of one process (`quick_ranks`).
"""

import fcntl
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import termios
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest
from cluster_runs import (
    PATIENCE_S,
    PIPELINE,
    RECIPE,
    SMALL,
    STEPS,
    TENSOR,
    Job,
    assert_same_losses,
    losses,
    prepared,
    saved_in,
    stop_at,
    train,
    train_until_cut_off,
    trained,
    undisturbed,
    until_step,
    wait_until,
)
from machines import USER
from machines import machines as start_machines
from typer.testing import CliRunner

from megatron_infoentropy.cli import app
from megatron_infoentropy.launch.cluster import Cluster

STOPPED = "== stopped after saving a checkpoint; the next job goes on from there\n"


def submit(run):
    command = ["sbatch", run / "job.slurm"]
    return Job(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


@pytest.fixture(scope="module")
def cut(quick_ranks, machines, tokens, tmp_path_factory):
    """A training on hosts of its own that notices, while others are tested, that one is cut off."""
    run = tmp_path_factory.mktemp("cut") / "run"
    with start_machines(quick_ranks) as others, ThreadPoolExecutor(1) as pool:
        yield train_until_cut_off(pool, others, tokens, run)


@pytest.fixture(params=[TENSOR, pytest.param(PIPELINE, marks=pytest.mark.slow)],
                ids=["tensor", "pipeline"])  # fmt: skip
def on_two_nodes(request, cut, slurm, tokens, tmp_path):
    """A run whose model lies across two nodes, under Slurm; (run, job, the flags of the layout)."""
    run = tmp_path / "run"
    cluster = Cluster(2, slurm=("--time=8:00:00",))
    said = train(prepared(tokens, run, cluster, settings=request.param))
    job = Job(said)
    assert f"to save a checkpoint and stop: scancel --signal=USR1 {job.number}" in said
    until_step(run, job, 3)
    yield run, job, request.param
    job.cancel()


def test_cancelled_amid_training_it_loses_no_step_and_the_next_job_ends_well(
    on_two_nodes, tokens, tmp_path
):
    run, job, settings = on_two_nodes
    log = run / "train.log"
    job.cancel()
    job.until(log, "CANCELLED")
    wait_until(lambda: log.read_text().endswith(STOPPED), log)
    saved = saved_in(run)
    assert saved == max(losses(run)) > 0, "steps that were trained were not saved"
    last = max(STEPS, saved + 2)
    stop_at(run, last)
    job = submit(run)
    job.until(log, "COMPLETED")
    assert f"successfully loaded checkpoint from {run}/checkpoints" in log.read_text()
    assert "== the training ended well" in log.read_text()
    assert json.loads((run / "run.json").read_text())["parameters"] > 10_000
    assert set(losses(run)) == set(range(1, last + 1))
    reference = undisturbed(tokens, tmp_path / "one", 2, last, settings)
    assert_same_losses(run, reference, {saved + 2})


def test_a_job_of_a_dry_run_is_one_that_slurm_would_take(slurm, tokens, tmp_path):
    run = tmp_path / "run"
    asked = launch_words(tokens, run, "--nodes", "2", "--slurm", "--time=1:00:00 -p low")
    said = CliRunner().invoke(app, [*asked, "--dry-run"])
    assert said.exit_code == 0, said.output
    command = ["sbatch", "--test-only", run / "job.slurm"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert re.search(r"Job \d+ to start at .* on nodes n\[1-2\] in partition low", done.stderr)


def launch_words(tokens: Path, run: Path, *words: str) -> list[str]:
    """`infoentropy launch` of an endless training of a tiny model."""
    asked = ("launch", RECIPE, "--data", tokens / "data", "--tokenizer", tokens / "tokenizer")
    asked += ("--run", run, "--gpus-per-node", 0, "--normalization", "global", "--overwrite")
    flags = ("--train-iters", 100000, "--lr-decay-iters", 100, "--log-interval", 1)
    return [str(word) for word in (*asked, *words, "--", *SMALL, *flags)]


class Terminal:
    """A command in a terminal of its own, which can be typed into and closed."""

    def __init__(self, *words: str) -> None:
        self._terminal, inside = pty.openpty()
        self.said, self._is_open = b"", True
        self.process = subprocess.Popen(
            words,
            stdin=inside,
            stdout=inside,
            stderr=inside,
            start_new_session=True,
            preexec_fn=_have_terminal,
        )
        os.close(inside)
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        with suppress(OSError):  # its other end is gone
            while self._is_open:
                if select.select([self._terminal], [], [], 0.1)[0]:
                    self.said += os.read(self._terminal, 4096)

    def type(self, text: bytes) -> None:
        os.write(self._terminal, text)

    def close(self) -> None:
        """As a closed window does: the kernel sends SIGHUP, and what is still said fails."""
        self._is_open = False
        self._reader.join()
        os.close(self._terminal)


def _have_terminal() -> None:
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    for number in (signal.SIGINT, signal.SIGHUP):  # ignored, if tests run in the background
        signal.signal(number, signal.SIG_DFL)


def launched(tokens: Path, run: Path, *words: str) -> Terminal:
    """`infoentropy launch` in a terminal, once its ranks have trained three more steps."""
    before = trained(run)
    command = (sys.executable, "-m", "megatron_infoentropy", *launch_words(tokens, run, *words))
    terminal = Terminal(*command)
    wait_until(
        lambda: terminal.process.poll() is not None or trained(run) >= before + 3,
        run / "train.log",
        said=lambda: terminal.said.decode(),
    )
    return terminal


def test_ctrl_c_and_a_closed_terminal_save_on_hosts_of_another_user_port_and_name(
    machines, tokens, tmp_path
):
    run = tmp_path / "run"
    meet = ("--rdzv-endpoint", "n1:29500")  # which is not what ssh's configuration calls it
    terminal = launched(tokens, run, "--hosts", "first,second", *meet)
    terminal.type(b"\x03")
    assert terminal.process.wait(PATIENCE_S) == 0, terminal.said
    assert b"stopped after saving a checkpoint; the same command goes on" in terminal.said
    saved = saved_in(run)
    assert saved == max(losses(run)) >= 3
    terminal = launched(tokens, run, "--hosts", f"{USER}@n1:2222,n2")
    terminal.close()
    assert terminal.process.wait(PATIENCE_S) == 0
    assert saved_in(run) == max(losses(run)) > saved
    log = (machines.base / "log/sshd.n1.log").read_text()
    assert log.count(f"Accepted publickey for {USER} from 10.213.7.254") >= 4


def test_two_hosts_train_as_one_and_survive_that_one_is_cut_off(cut, tokens, tmp_path):
    cut.assert_ends_by_itself()
    at = cut.go_on()
    reference = undisturbed(tokens, tmp_path / "one", 1, max(losses(cut.run)))
    assert_same_losses(cut.run, reference, {at + 2})
