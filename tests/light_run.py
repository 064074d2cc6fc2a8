"""A run folder with all of the scripts, whose torchrun and ranks are a program of a few lines.

Its rank saves when it is asked to, on node 0 as step `step`, or ends then with exit code `code`; it
also ends when it is told to by `end`.
"""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

from process_tree import wait_until

from megatron_infoentropy.launch.cluster import Cluster
from megatron_infoentropy.launch.recipe import written_flags
from megatron_infoentropy.launch.scripts import Plan, write

FLAGS = tuple(written_flags({}, {}))
# As torchrun: of the signals it is told to handle it ends, and its rank; a dead one it restarts.
TORCHRUN = """#!{python} -IS
import os, pathlib, signal, sys, time

if "torch.distributed.run" not in sys.argv:
    os.execv("{python}", ["{python}", *sys.argv[1:]])
run, node = pathlib.Path({run!r}), os.environ.get("NODE") or os.environ.get("SLURM_NODEID", "0")
(run / ("words-" + node)).write_text("\\n".join(sys.argv[1:]))

def save(number, frame):
    if {code}:
        os._exit({code})
    for _ in range(5):  # an order that comes again changes nothing
        time.sleep(0.05)
        os.write(1, b"saving\\n")
    if {step} and node == "0":
        (run / "checkpoints/latest_checkpointed_iteration.txt").write_text("{step}")
    (run / ("saved-" + node)).touch()
    os.write(1, b"exiting program after receiving SIGTERM\\n")
    os._exit(0)

def train():
    signal.signal(signal.SIGTERM, save)
    with (run / "started").open("a") as file:
        file.write("node " + node + " of " + str(len(os.sched_getaffinity(0))) + " CPUs\\n")
    end = run / ("end-" + node)
    late = time.monotonic() + 300  # of a test that has failed
    while not end.exists() and time.monotonic() < late:
        os.write(1, b"a step\\n")
        time.sleep(0.05)
    (run / ("ended-" + node)).touch()
    os._exit(int(end.read_text()))

def end(number, frame):  # torchrun's ranks then have 30 seconds; here none
    if rank:
        os.kill(rank, signal.SIGKILL)
    os._exit(1)

rank = 0
for name in os.environ.get("PET_SIGNALS_TO_HANDLE", "SIGTERM,SIGINT,SIGHUP,SIGQUIT").split(","):
    signal.signal(getattr(signal, name), end)
for _ in range(1 + int(sys.argv[sys.argv.index("--max-restarts") + 1])):
    rank = os.fork()
    if rank == 0:
        train()
    code = os.waitstatus_to_exitcode(os.waitpid(rank, 0)[1])
    rank = 0
    if code == 0:
        time.sleep(0.5)  # for other nodes
        break
sys.exit(code)
"""


def write_program(path: Path, text: str) -> Path:
    path.write_text(text)
    path.chmod(0o755)
    return path


def text_of(path: Path) -> str:
    return path.read_text() if path.exists() else ""


class LightRun:
    """A run folder whose training is at step 4, and at `step` when it saves."""

    def __init__(self, folder: Path, cluster: Cluster, step: int = 7, code: int = 0) -> None:
        self.folder, self.log, self.nodes = folder, folder / "train.log", cluster.nodes
        self.tracker = folder / "checkpoints/latest_checkpointed_iteration.txt"
        self.tracker.parent.mkdir(parents=True)
        self.tracker.write_text("4")
        text = TORCHRUN.format(python=sys.executable, run=str(folder), step=step, code=code)
        self.torchrun = write_program(folder / "torchrun", text)
        flags = (*FLAGS, "--save", str(folder / "checkpoints"))
        ranks = cluster.ranks_per_node or 1
        settings = {"gpus_per_node": 0, "ranks_per_node": ranks, "python": str(self.torchrun)}
        self.plan = Plan(folder, flags, replace(cluster, **settings), "a test")
        write(self.plan, overwrite=True)
        self.command = self.plan.command

    def start(self, *words: str) -> "subprocess.Popen[str]":
        """The scripts as a process in a session of its own, with words for them."""
        # Who starts the tests in the background of a script has SIGINT ignored, for bash for ever.
        words = ("env", "--default-signal=INT", *self.command, *words)
        pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        return subprocess.Popen(words, start_new_session=True, **pipe)

    def end(self, code: int, node: int = 0) -> None:
        """Have a node's ranks end with an exit code, as soon as they are there."""
        path = self.folder / f"end-{node}"
        path.with_suffix(".new").write_text(str(code))
        path.with_suffix(".new").rename(path)

    def until_started(self, times: int = 1) -> None:
        assert wait_until(lambda: len(self.started) == times * self.nodes), text_of(self.log)

    @property
    def started(self) -> list[str]:
        return sorted(text_of(self.folder / "started").splitlines())

    @property
    def saved(self) -> int:
        return int(self.tracker.read_text())

    def has_saved(self, node: int = 0) -> bool:
        return (self.folder / f"saved-{node}").exists()

    def words(self, node: int = 0) -> list[str]:
        """The words that torchrun was given."""
        return (self.folder / f"words-{node}").read_text().splitlines()
