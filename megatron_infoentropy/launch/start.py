"""Writes the scripts of a training on a cluster into its run folder, and starts them."""

import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from megatron_infoentropy.files import write_whole
from megatron_infoentropy.launch.cluster import Cluster, absolute
from megatron_infoentropy.launch.job import TrainingJob
from megatron_infoentropy.launch.lineage import saved_step
from megatron_infoentropy.launch.recipe import read_facts
from megatron_infoentropy.launch.run_folder import LOG, recorded, require_same, write_facts
from megatron_infoentropy.launch.scripts import (
    ASKED,
    HOSTS,
    JOB,
    NODE,
    SAVE_ON_SIGNAL,
    Plan,
    hosts_script,
    job_script,
    node_command,
    node_script,
)
from megatron_infoentropy.launch.train import follow

# The scripts take each as the order to save and stop.
ORDERS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)


@dataclass(frozen=True)
class Prepared:
    """Scripts by their name, as text, and what starts them all."""

    plan: Plan
    scripts: dict[str, str]
    command: list[str]
    by_hand: bool  # every node's user starts it: nothing here reaches the nodes


def prepare(job: TrainingJob, cluster: Cluster, made_by: str) -> Prepared:
    """Make the scripts of a training; nothing is written.

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
    flags = tuple(job.flags(cluster.device))
    require_same(run, list(flags), switch=job.switch)
    cluster = cluster.complete(read_facts(list(flags)))
    plan = Plan(run, flags, cluster, made_by)
    scripts = {NODE: node_script(plan)}
    if cluster.slurm is not None:
        scripts[JOB] = job_script(plan)
        command = ["sbatch", str(run / JOB)]
    elif cluster.hosts:
        scripts[HOSTS] = hosts_script(plan)
        command = ["bash", str(run / HOSTS)]
    else:
        command = [*node_command(cluster.container).split(), str(run / NODE)]
    by_hand = cluster.nodes > 1 and len(scripts) == 1
    return Prepared(plan, scripts, command, by_hand)


def write(prepared: Prepared, *, overwrite: bool = False) -> list[Path]:
    """Write the scripts into the run folder; returns their paths.

    Raises:
        ValueError: one is there that says something else: it may have been edited.
    """
    run = prepared.plan.run
    for name, text in prepared.scripts.items():
        path = run / name
        if (
            path.is_file()
            and not overwrite
            and _content(path.read_text(encoding="utf-8")) != _content(text)
        ):
            raise ValueError(
                f"{path} is there and differs from what this command line makes: start it as it "
                f"is with `{' '.join(prepared.command)}`, or replace it with --overwrite"
            )
    run.mkdir(parents=True, exist_ok=True)
    for name, text in prepared.scripts.items():
        write_whole(run / name, text, executable=True)
    return [run / name for name in prepared.scripts]


def _content(script: str) -> str:
    """A script without the command line that made it: another one may make the same."""
    return re.sub(r"^# Made by: .*$", "", script, count=1, flags=re.MULTILINE)


def record(prepared: Prepared, recipe: Path, *, is_start: bool) -> None:
    """Write run.json of a training that others start; what has trained stays as it is till then."""
    plan = prepared.plan
    if is_start or saved_step(plan.run, list(plan.flags)) is None:
        write_facts(plan.run, recipe, *_facts_of(prepared))


def _facts_of(prepared: Prepared) -> tuple[list[str], int, str]:
    """(command line, ranks, device), for run.json"""
    cluster = prepared.plan.cluster
    device = f"{cluster.ranks} x {'GPU' if cluster.gpus_per_node else 'CPU rank'}"
    return [*prepared.command, *prepared.plan.flags], cluster.ranks, device


def how_to_start(prepared: Prepared) -> list[str]:
    """For a reader: what to type to start the scripts by hand."""
    if not prepared.by_hand:
        return [f"start it with: {shlex.join(prepared.command)}"]
    words = shlex.join(prepared.command)
    return ["start it on every node:"] + [
        f"  NODE={node} {words}" for node in range(prepared.plan.cluster.nodes)
    ]


def start(prepared: Prepared, recipe: Path, on_line: Callable[[str], object]) -> str:
    """Start the scripts: follow them to their end, or leave them to Slurm. Returns what happened.

    Raises:
        TrainingFailed: the training failed, with the reason where it is known.
        RuntimeError: sbatch refused the job.
    """
    plan = prepared.plan
    if plan.cluster.slurm is not None:
        record(prepared, recipe, is_start=True)
        return _submit(prepared.command, plan.run / LOG)

    def hear(line: str) -> None:
        if ASKED in line:
            with suppress(OSError):  # the terminal may be gone
                sys.stderr.write(line)
        on_line(line)

    # nohup and `&` of a script have some ignored, here as in the scripts.
    orders = tuple(order for order in ORDERS if signal.getsignal(order) != signal.SIG_IGN)
    with recorded(plan.run, recipe, *_facts_of(prepared)):
        said = follow(plan.run, prepared.command, {}, hear, orders)
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
