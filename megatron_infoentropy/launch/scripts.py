"""The scripts that start a training: plain bash around torchrun, to be read, kept and edited.

Each (node.sh, hosts.sh, job.slurm) is a head, made here, that sets variables of the training, and a
body that is the same for all: the file of its name beside this one. docs/launching.md says what
they do, and how a training is stopped without loss:

    Slurm --SIGUSR1, `save_s` before the limit--> job.slurm --> srun --> node.sh --SIGTERM--> ranks
    ranks save and exit 0 --> srun ends --> job.slurm: scontrol requeue --> the same from there on
"""

import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path

from megatron_infoentropy.files import write_whole
from megatron_infoentropy.launch.cluster import ABOUT, PORT, Cluster, absolute
from megatron_infoentropy.launch.job import TrainingJob
from megatron_infoentropy.launch.recipe import last_value, ranks_of_a_model, read_facts
from megatron_infoentropy.launch.run_folder import (
    LOG,
    recorded,
    require_same,
    saved_step,
    write_facts,
)
from megatron_infoentropy.launch.train import follow, require_unlocked
from megatron_infoentropy.runtime.device import CPU_ENVIRONMENT

NODE, HOSTS, JOB = "node.sh", "hosts.sh", "job.slurm"
SAVE_ON_SIGNAL = ("--exit-signal-handler", "--exit-signal", "SIGTERM")


@dataclass(frozen=True)
class Plan:
    """A training on a cluster: Megatron's flags, where its run folder is, who made it."""

    run: Path
    flags: tuple[str, ...]
    cluster: Cluster
    made_by: str  # the command line, for the scripts' first lines

    @property
    def title(self) -> str:
        """Name the machines and the layout, for a reader."""
        cluster, facts = self.cluster, read_facts(list(self.flags))
        kind = "GPUs" if cluster.gpus_per_node else "CPU ranks"
        copies = cluster.ranks // ranks_of_a_model(facts)
        layout = f"tensor {facts['tensor_parallel']} x pipeline {facts['pipeline_parallel']}"
        return f"{cluster.nodes} x {cluster.ranks_per_node} {kind}: {layout} x data {copies}"

    @property
    def scripts(self) -> dict[str, str]:
        """Return the scripts' texts, by their names."""
        scripts = {NODE: node_script(self)}
        if self.cluster.slurm is not None:
            scripts[JOB] = job_script(self)
        elif self.cluster.hosts:
            scripts[HOSTS] = hosts_script(self)
        return scripts

    @property
    def command(self) -> list[str]:
        """Return what starts them, all of them unless `by_hand`."""
        if self.cluster.slurm is not None:
            return ["sbatch", str(self.run / JOB)]
        if self.cluster.hosts:
            return ["bash", str(self.run / HOSTS)]
        return [*node_command(self.cluster).split(), str(self.run / NODE)]

    @property
    def by_hand(self) -> bool:
        """Say whether every node's user starts it, since nothing here reaches the nodes."""
        reached = self.cluster.hosts or self.cluster.slurm is not None
        return self.cluster.nodes > 1 and not reached


def _script(name: str, head: Iterable[str]) -> str:
    body = Path(__file__).with_name(name).read_text(encoding="utf-8")
    return "\n".join(["#!/usr/bin/env bash", *head, "", body])


def node_script(plan: Plan) -> str:
    """node.sh: one node's ranks, from the environment variables NODE and RDZV_ENDPOINT."""
    cluster = plan.cluster
    return _script(NODE, [
        f"# One node of the training {plan.run.name}, {plan.title}.",
        f"# Made by: {plan.made_by}",
        "# Edit it as you like: it is all that a node runs. NODE (0, 1, ...) says which one it is.",
        "# Words given to it torchrun runs instead of the training, `infoentropy doctor` for one.",
        f"# To save a checkpoint and stop: Ctrl-C, or kill -USR1 $(cat {plan.run}/node-0.pid)",
        "set -euo pipefail",
        "",
        f"run={shlex.quote(str(plan.run))}",
        f"nodes={cluster.nodes}",
        f"ranks={cluster.ranks_per_node} # of this node",
        "node=${NODE:-${SLURM_NODEID:-0}}",
        f"endpoint=${{RDZV_ENDPOINT:-{cluster.endpoint}}} # where the nodes meet",
        f"id=${{RDZV_ID:-{shlex.quote(plan.run.name)}}}",
        f"patience={cluster.join_timeout_s + cluster.store_timeout_s} # seconds without ranks",
        "",
        *_environment(cluster),
        "",
        "flags=(",
        *_one_flag_a_line(plan.flags),
        ")",
        "",
        "torchrun=(",
        f"  {shlex.quote(cluster.python)} -m torch.distributed.run",
        '  --nnodes "$nodes" --nproc-per-node "$ranks"',
        '  --rdzv-backend c10d --rdzv-endpoint "$endpoint" --rdzv-id "$id"',
        '  --rdzv-conf "is_host=$((node == 0)),'
        f'join_timeout={cluster.join_timeout_s},read_timeout={cluster.store_timeout_s}"',
        f"  --max-restarts {cluster.max_restarts}",
        *(['  --local-addr "$address"'] if cluster.interface else []),
        ")",
    ])  # fmt: skip


def _environment(cluster: Cluster) -> list[str]:
    """Lines that set what the ranks need, unless it is set already."""
    wanted = {
        "CUDA_DEVICE_MAX_CONNECTIONS": "1",  # tensor parallelism relies on the order of launches
        "PYTHONUNBUFFERED": "1",
        # torchrun's own store outlives a restart, and with it the addresses of dead ranks.
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
    }
    if cluster.gpus_per_node:
        wanted["NCCL_DEBUG"] = "WARN"
    else:
        wanted |= CPU_ENVIRONMENT
    lines = [
        "threads=$(($(nproc) / ranks))",
        "export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((threads > 0 ? threads : 1))}",
        *(f"export {name}=${{{name}:-{value}}}" for name, value in wanted.items()),
    ]
    if cluster.interface:
        name = shlex.quote(cluster.interface)
        lines += [
            f"export NCCL_SOCKET_IFNAME={name} GLOO_SOCKET_IFNAME={name}",
            f"address=$(ip -4 -o addr show dev {name} | awk '{{print $4; exit}}' | cut -d/ -f1)",
            f'[ -n "$address" ] || {{ echo "node $node: no IPv4 address on {name}" >&2; exit 1; }}',
        ]
    return lines


def node_command(cluster: Cluster) -> str:
    """Return what a node runs before the path of node.sh; Pyxis is a part of srun itself."""
    if cluster.image is None or cluster.engine == "pyxis":
        return "bash"
    binds = [f"--bind {shlex.quote(mount)}" for mount in cluster.mounts]
    return " ".join(["apptainer exec --nv", *binds, shlex.quote(cluster.image), "bash"])


def _one_flag_a_line(words: Iterable[str]) -> list[str]:
    """Every flag with its values, quoted for bash; of a flag given twice the last one."""
    flags: dict[str, list[str]] = {}
    for word in words:
        if word.startswith("--"):
            name = word.partition("=")[0]
            flags.pop(name, None)
            flags[name] = [word]
        else:
            flags[name].append(word)
    return [f"  {shlex.join(flag)}" for flag in flags.values()]


def hosts_script(plan: Plan) -> str:
    """hosts.sh: every host's node.sh; the first failure, or a signal, stops them all."""
    return _script(HOSTS, [
        f"# The training {plan.run.name} on hosts reached by ssh, {plan.title}.",
        f"# Made by: {plan.made_by}",
        "# SIGUSR1, SIGTERM, Ctrl-C or a closed terminal: a checkpoint is saved, and it stops.",
        "set -uo pipefail",
        "",
        f"run={shlex.quote(str(plan.run))} # the same folder on every host",
        f"command={shlex.quote(node_command(plan.cluster))} # runs node.sh",
        "answer_s=60 # for a host's first answer",
        "hosts=(",
        *(f"  {shlex.quote(str(host))}" for host in plan.cluster.hosts),
        ")",
    ])  # fmt: skip


def job_script(plan: Plan) -> str:
    """job.slurm, for `sbatch`."""
    cluster = plan.cluster
    assert cluster.slurm is not None
    options = [
        f"--job-name={_job_name(plan.run)}",
        "--dependency=singleton",  # of jobs of one name, one runs at a time
        f"--nodes={cluster.nodes}",
        "--ntasks-per-node=1",  # torchrun starts the ranks
        *([f"--gpus-per-node={cluster.gpus_per_node}"] if cluster.gpus_per_node else []),
        *_whole_nodes(cluster.slurm),
        f"--output={str(plan.run / LOG).replace('%', '%%')}",
        "--open-mode=append",
        "--requeue",
        f"--signal=B:USR1@{cluster.save_s}",
        *cluster.slurm,
    ]
    # outside a container its python may be absent, or lack the package
    python = sys.executable if cluster.image else cluster.python
    return _script(JOB, [
        f"# The training {plan.run.name} under Slurm, {plan.title}.",
        f"# Made by: {plan.made_by}",
        "# Start it with `sbatch job.slurm`, as often as you like: a job waits for the one before,",
        "# and goes on from its checkpoint. To save one and stop: scancel --signal=USR1 JOB",
        *(f"#SBATCH {_quoted(option)}" for option in options),
        "set -euo pipefail",
        "",
        f"run={shlex.quote(str(plan.run))}",
        f"checkpoints={shlex.quote(last_value(list(plan.flags), 'save') or '')}",
        f"given={cluster.address} # where the nodes meet, if not on the first one",
        f"port={PORT} # and more, by the job's number",
        "id=''",
        f"save_s={cluster.save_s} # Slurm's signal comes so long before the time limit",
        f"max_requeues={'' if cluster.max_requeues is None else cluster.max_requeues}",
        f"give_up_s={max(1, cluster.save_s - max(5, cluster.save_s // 8))} # for saving",
        f"python={shlex.quote(python)}",
        f"srun=({_srun(cluster)})",
    ])  # fmt: skip


def _job_name(run: Path) -> str:
    """Return the run folder's name, and what tells it from folders of that name elsewhere."""
    return f"{run.name}-{sha256(str(run).encode()).hexdigest()[:6]}"


def _whole_nodes(slurm: tuple[str, ...]) -> list[str]:
    """Ask for all CPUs and memory of the nodes, unless options of the user's are about them.

    Slurm's default for a task, which here starts all ranks of a node, is one CPU.
    """
    about_cpus = re.compile(r"--(cpus-|mincpus|exclusive|oversubscribe)|-[cs]")
    if any(about_cpus.match(option) for option in slurm):
        return []
    has_memory = any(ABOUT["--mem"].match(option) for option in slurm)
    return ["--exclusive", *([] if has_memory else ["--mem=0"])]


def _quoted(option: str) -> str:
    """An option of sbatch, which takes quotes as a shell does."""
    name, blank, value = option.partition(" ") if option[:2] != "--" else (option, "", "")
    return shlex.quote(name) + (blank and f" {shlex.quote(value)}")


def _srun(cluster: Cluster) -> str:
    """srun with what stands before the path of node.sh."""
    # Ranks bind themselves; Slurm may bind a task, and with it all of them, to one CPU.
    words = ["srun", "--kill-on-bad-exit=1", "--cpu-bind=none"]
    if cluster.image is not None and cluster.engine == "pyxis":
        words.append(f"--container-image={shlex.quote(cluster.image)}")
        if cluster.mounts:
            words.append(f"--container-mounts={shlex.quote(','.join(cluster.mounts))}")
    return " ".join([*words, node_command(cluster)])


# The scripts take each as the order to save and stop.
ORDERS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)


def prepare(job: TrainingJob, cluster: Cluster, made_by: str) -> Plan:
    """Check a training and plan its scripts; nothing is written.

    Raises:
        ValueError: a recipe, dataset, objective or layout that cannot be used, in words.
    """
    run = absolute(job.run, cluster)
    job = replace(
        job,
        data=absolute(job.data, cluster),
        tokenizer=absolute(job.tokenizer, cluster),
        run=run,
        extra_flags=(*job.extra_flags, *SAVE_ON_SIGNAL),  # the scripts rely on them
    )
    flags = job.flags(cluster.device)
    require_same(run, flags, switch=job.switch)
    return Plan(run, tuple(flags), cluster.complete(read_facts(flags)), made_by)


def write(plan: Plan, *, overwrite: bool = False) -> list[Path]:
    """Write the scripts into the run folder; returns their paths.

    Raises:
        ValueError: one is there that says something else: it may have been edited.
        RuntimeError: another training has the run folder. Slurm lets a job wait for it.
    """
    if plan.cluster.slurm is None:
        require_unlocked(plan.run)
    texts = {plan.run / name: text for name, text in plan.scripts.items()}
    for path, text in texts.items():
        if overwrite or not path.is_file():
            continue
        if _content(path.read_text(encoding="utf-8")) != _content(text):
            raise ValueError(
                f"{path} is there and differs from what this command line makes: start it as it "
                f"is with `{' '.join(plan.command)}`, or replace it with --overwrite"
            )
    for path, text in texts.items():
        write_whole(path, text, executable=True)
    return list(texts)


def _content(script: str) -> str:
    """Return a script without the command line that made it: another one may make the same."""
    return re.sub(r"^# Made by: .*$", "", script, count=1, flags=re.MULTILINE)


def record(plan: Plan, recipe: Path, *, is_start: bool) -> None:
    """Write run.json of a training that others start; what has trained stays as it is till then."""
    if is_start or saved_step(plan.run, list(plan.flags)) is None:
        write_facts(plan.run, recipe, *_facts_of(plan))


def _facts_of(plan: Plan) -> tuple[list[str], int, str]:
    """Return the command line, ranks and device, for run.json."""
    cluster = plan.cluster
    device = f"{cluster.ranks} x {'GPU' if cluster.gpus_per_node else 'CPU rank'}"
    return [*plan.command, *plan.flags], cluster.ranks, device


def how_to_start(plan: Plan) -> list[str]:
    """Return what to type to start the scripts by hand."""
    words = shlex.join(plan.command)
    if not plan.by_hand:
        return [f"start it with: {words}"]
    nodes = range(plan.cluster.nodes)
    return ["start it on every node:", *(f"  NODE={node} {words}" for node in nodes)]


def start(plan: Plan, recipe: Path) -> str:
    """Start the scripts: follow them to their end, or leave them to Slurm. Returns what happened.

    Raises:
        TrainingFailed: the training failed, with the reason where it is known.
        RuntimeError: sbatch refused the job.
    """
    if plan.cluster.slurm is not None:
        record(plan, recipe, is_start=True)
        return _submit(plan.command, plan.run / LOG)

    # nohup and `&` of a script have some ignored, here as in the scripts.
    orders = tuple(order for order in ORDERS if signal.getsignal(order) != signal.SIG_IGN)
    with recorded(plan.run, recipe, *_facts_of(plan)):
        said = follow(plan.run, plan.command, {}, orders)
    if said.was_stopped:
        return "stopped after saving a checkpoint; the same command goes on from there"
    return f"done; the run folder is {plan.run}; {said.outcome()}"


def _submit(command: list[str], log: Path) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    except FileNotFoundError:
        raise RuntimeError(
            "there is no sbatch on this machine: run `infoentropy launch` on a login node of the "
            f"cluster, or take {command[-1]} there"
        ) from None
    if done.returncode != 0:
        raise RuntimeError(f"sbatch refused {command[-1]}: {done.stderr.strip()}")
    said = done.stdout.strip()  # also of sites that print more than this
    number = re.search(r"Submitted batch job (\d+)", said)
    job = number[1] if number else "JOB"
    return (
        f"{said}\nits log is {log}\nto save a checkpoint and stop: scancel --signal=USR1 {job}; "
        "the same command goes on from there"
    )
