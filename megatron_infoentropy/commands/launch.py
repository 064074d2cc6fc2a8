"""The command that trains on any number of machines: torchrun, ssh or Slurm, by scripts."""

import shlex
import sys
from typing import Annotated

import typer

from megatron_infoentropy.commands.training import (
    Data,
    Gamma,
    MegatronFlags,
    Normalization,
    Objective,
    PipelineParallel,
    Recipe,
    Run,
    Seed,
    Sigma,
    Switch,
    TensorParallel,
    Tokenizer,
    Verbose,
    training_settings,
    warn,
)
from megatron_infoentropy.console import make_console

out = make_console()


def launch(
    recipe: Recipe,
    megatron_flags: MegatronFlags = None,
    *,
    nodes: Annotated[
        int | None, typer.Option(min=1, help="machines; default: as many as --hosts, else 1")
    ] = None,
    gpus_per_node: Annotated[
        int | None, typer.Option(min=0, help="default: this machine's; 0 trains on CPUs")
    ] = None,
    ranks_per_node: Annotated[
        int | None, typer.Option(min=1, help="default: the GPUs; on CPUs what one model needs")
    ] = None,
    slurm: Annotated[
        str | None,
        typer.Option(help="submit to Slurm, with these options of sbatch: '--time=8:00:00 -p gpu'"),
    ] = None,
    hosts: Annotated[
        str | None,
        typer.Option(help="start by ssh on these: a,user@b,user@c:22 (the run folder shared)"),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="write and print the scripts, start nothing")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="replace scripts in the run folder that differ")
    ] = False,
    data: Data = None,
    tokenizer: Tokenizer = None,
    run: Run = None,
    objective: Objective = None,
    gamma: Gamma = None,
    sigma: Sigma = None,
    normalization: Normalization = None,
    seed: Seed = None,
    tensor_parallel: TensorParallel = None,
    pipeline_parallel: PipelineParallel = None,
    switch: Switch = False,
    max_restarts: Annotated[
        int, typer.Option(min=0, help="times that torchrun restarts the ranks after a failure")
    ] = 3,
    rdzv_endpoint: Annotated[
        str, typer.Option(help="HOST:PORT where nodes meet; default: the first node, 29500")
    ] = "",
    rdzv_id: Annotated[str, typer.Option(help="name of the meeting; default: the run's")] = "",
    join_timeout: Annotated[
        int, typer.Option(min=1, help="seconds that nodes wait for each other")
    ] = 600,
    store_timeout: Annotated[
        int, typer.Option(min=1, help="seconds after which a silent first node is given up")
    ] = 60,
    interface: Annotated[
        str, typer.Option(help="network interface for NCCL, gloo and the rendezvous: ib0, eth0")
    ] = "",
    save_seconds: Annotated[
        int, typer.Option(min=10, help="Slurm: save and requeue so long before the time limit")
    ] = 120,
    container_image: Annotated[
        str | None, typer.Option(help="train inside this image; its python must have the package")
    ] = None,
    container_engine: Annotated[
        str | None, typer.Option(help="pyxis (Enroot, with --slurm; its default) or apptainer")
    ] = None,
    container_mount: Annotated[
        list[str] | None, typer.Option(help="HOST_PATH:PATH seen inside; repeatable")
    ] = None,
    python: Annotated[
        str | None, typer.Option(help="on the nodes; default: this one, in a container python")
    ] = None,
    verbose: Verbose = False,
) -> None:
    """Train on any number of machines: writes readable scripts for torchrun, ssh or Slurm, starts
    them.

    On one machine as `infoentropy train`, with restarts. The scripts lie in the run folder: node.sh
    (what a node runs), hosts.sh or job.slurm; they can be edited and started by hand. SIGUSR1, or
    whatever Slurm ends a job with, saves a checkpoint first; the same command goes on from it.
    """
    from megatron_infoentropy.launch import cluster as machines
    from megatron_infoentropy.launch import start as launching
    from megatron_infoentropy.launch.job import TrainingJob, require_places

    settings = training_settings(
        objective, gamma, sigma, normalization, seed, tensor_parallel, pipeline_parallel
    )
    places = require_places(data=data, tokenizer=tokenizer, run=run)
    extra = tuple(megatron_flags or ())
    job = TrainingJob(recipe, *places, settings, extra_flags=extra, switch=switch)
    named = () if hosts is None else machines.parse_hosts(hosts)
    engine = container_engine or ("pyxis" if slurm is not None else "apptainer")
    container = machines.parse_container(engine, container_image, container_mount or [])
    cluster = machines.Cluster(
        nodes=nodes or len(named) or 1,
        gpus_per_node=gpus_per_node,
        ranks_per_node=ranks_per_node,
        hosts=named,
        slurm=None if slurm is None else machines.parse_slurm(slurm),
        container=container,
        interface=interface,
        rdzv_id=rdzv_id,
        address=rdzv_endpoint,
        max_restarts=max_restarts,
        join_timeout_s=join_timeout,
        store_timeout_s=store_timeout,
        save_s=save_seconds,
        python=python or ("python" if container else sys.executable),
    )
    made_by = " ".join(shlex.join(["infoentropy", *sys.argv[1:]]).split())  # one line: a comment
    prepared = launching.prepare(job, cluster, made_by)
    warn(list(prepared.plan.flags))
    paths = launching.write(prepared, overwrite=overwrite)
    for path in paths:
        out.print(f"== {path}")
        if dry_run:
            out.print(path.read_text(encoding="utf-8"))
    if dry_run or prepared.by_hand:
        launching.record(prepared, recipe, is_start=not dry_run)
        for line in launching.how_to_start(prepared):
            out.print(line)
        return
    on_line = sys.stdout.write if verbose else lambda line: None
    out.print(launching.start(prepared, recipe, on_line))


COMMANDS = (launch,)
