"""A run folder with all of the scripts, whose torchrun and rank are a program of a few lines.

The rank saves when it is asked to, as far as it is said to have trained, on its node 0.
"""

import sys
from dataclasses import replace
from pathlib import Path

from cluster_runs import text_of, wait_until

from megatron_infoentropy.launch.cluster import Cluster
from megatron_infoentropy.launch.recipe import written_flags
from megatron_infoentropy.launch.scripts import Plan, write

FLAGS = tuple(written_flags({}, {}))
TORCHRUN = """#!{python} -IS
import os, pathlib, signal, sys, time

if "torch.distributed.run" not in sys.argv:
    os.execv("{python}", ["{python}", *sys.argv[1:]])
run, node = pathlib.Path("{run}"), os.environ.get("NODE") or os.environ["SLURM_NODEID"]
(run / "words").write_text("\\n".join(sys.argv[1:]))

def save(number, frame):
    for _ in range(5):  # an order that comes again changes nothing
        time.sleep(0.05)
    if {step} and node == "0":
        (run / "checkpoints/latest_checkpointed_iteration.txt").write_text("{step}")
    (run / ("saved-" + node)).touch()
    os.write(1, b"exiting program after receiving SIGTERM\\n")
    os._exit(0)

rank = os.fork()
if rank == 0:
    signal.signal(signal.SIGTERM, save)
    with (run / "started").open("a") as file:
        file.write("node " + node + " of " + str(len(os.sched_getaffinity(0))) + " CPUs\\n")
    while not (run / "end").exists():
        os.write(1, b"a step\\n")
        time.sleep(0.05)
    os._exit(3)
def end(number, frame):  # as torchrun, whose ranks then have 30 seconds; here none
    os.kill(rank, signal.SIGKILL)
    os._exit(1)

for name in os.environ.get("PET_SIGNALS_TO_HANDLE", "SIGTERM,SIGINT,SIGHUP,SIGQUIT").split(","):
    signal.signal(getattr(signal, name), end)
_, status = os.waitpid(rank, 0)
sys.exit(os.waitstatus_to_exitcode(status))
"""


class LightRun:
    """A run folder whose training is at step 4, and at `step` when it saves."""

    def __init__(self, folder: Path, cluster: Cluster, step: int = 7) -> None:
        self.folder, self.log, self.nodes = folder, folder / "train.log", cluster.nodes
        self.tracker = folder / "checkpoints/latest_checkpointed_iteration.txt"
        self.tracker.parent.mkdir(parents=True)
        self.tracker.write_text("4")
        torchrun = folder / "torchrun"
        torchrun.write_text(TORCHRUN.format(python=sys.executable, run=folder, step=step))
        torchrun.chmod(0o755)
        self._flags = (*FLAGS, "--save", str(folder / "checkpoints"))
        self.write(cluster)

    def write(self, cluster: Cluster) -> None:
        """Write the scripts; `command` starts them."""
        settings = {"gpus_per_node": 0, "ranks_per_node": 1}
        python = str(self.folder / "torchrun")
        plan = Plan(self.folder, self._flags, replace(cluster, python=python, **settings), "a test")
        write(plan, overwrite=True)
        self.command = plan.command

    def until_started(self, times: int = 1) -> None:
        wait_until(lambda: len(self.started) == times * self.nodes, self.log)

    @property
    def started(self) -> list[str]:
        return sorted(text_of(self.folder / "started").splitlines())

    @property
    def saved(self) -> int:
        return int(self.tracker.read_text())

    def has_saved(self, node: int) -> bool:
        return (self.folder / f"saved-{node}").exists()
