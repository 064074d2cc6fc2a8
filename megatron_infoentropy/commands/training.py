"""Commands that train, here or on many machines, and take checkpoints to Hugging Face and back."""

import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from megatron_infoentropy.commands import Overwrite, out

Recipe = Annotated[Path, typer.Argument(help="YAML of Megatron flags; see examples/")]
MegatronFlags = Annotated[
    list[str] | None, typer.Argument(help="more Megatron flags, after --; the last one counts")
]
Data = Annotated[
    Path | None,
    typer.Option(help="folder with train/, validation/, test/ datasets, or .jsonl of chats"),
]
Tokenizer = Annotated[Path | None, typer.Option(help="Hugging Face tokenizer folder")]
Run = Annotated[Path | None, typer.Option(help="folder for this run: log, checkpoints, facts")]
Objective = Annotated[
    str | None,
    typer.Option(
        help="infoentropy, cross_entropy, focal, lin_focal, eaft, dft, deft, eslm or entrodrop"
    ),
]
Gamma = Annotated[float | None, typer.Option(help="exponent of the weight")]
Sigma = Annotated[float | None, typer.Option(help="added to the entropy, nats")]
Normalization = Annotated[str | None, typer.Option(help="paper, global or none")]
Seed = Annotated[int | None, typer.Option(help="of initialisation and data order")]
TensorParallel = Annotated[int | None, typer.Option(min=1, help="vocabulary and weight shards")]
PipelineParallel = Annotated[int | None, typer.Option(min=1, help="pipeline stages")]
Switch = Annotated[
    bool,
    typer.Option(
        "--switch", help="go on from the run's checkpoint with another loss or seed; run.json tells"
    ),
]


def training_settings(
    objective: str | None,
    gamma: float | None,
    sigma: float | None,
    normalization: str | None,
    seed: int | None,
    tensor_parallel: int | None,
    pipeline_parallel: int | None,
) -> dict[str, Any]:
    """Options that are Megatron's flags or ours, by the flag's name."""
    from megatron_infoentropy.launch.recipe import loss_flags

    loss = {"objective": objective, "gamma": gamma, "sigma": sigma, "normalization": normalization}
    return loss_flags(loss) | {"seed": seed} | parallel_settings(tensor_parallel, pipeline_parallel)


def parallel_settings(
    tensor_parallel: int | None, pipeline_parallel: int | None
) -> dict[str, int | None]:
    """Return Megatron's flags of the two, without dashes."""
    return {
        "tensor-model-parallel-size": tensor_parallel,
        "pipeline-model-parallel-size": pipeline_parallel,
    }


def warn(words: list[str]) -> None:
    """Say on stderr what of a training's command line is hardly ever meant."""
    from megatron_infoentropy.launch.recipe import warnings

    for warning in warnings(words):
        typer.echo(warning, err=True)


def next_step(run: Path, tokenizer: Path) -> str:
    """Return the command that exports a trained model, or why it would refuse."""
    from megatron_infoentropy.convert import why_not_exported

    if reason := why_not_exported(run / "checkpoints"):
        return f"no export to Hugging Face: {reason}"
    words = [run / "checkpoints", "--tokenizer", tokenizer, "--output", run / "hf"]
    return f"next: infoentropy convert {shlex.join(map(str, words))}"


def train(
    recipe: Recipe,
    megatron_flags: MegatronFlags = None,
    *,
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
    ranks: Annotated[
        int | None, typer.Option(min=1, help="processes; default: as many as GPUs and batch allow")
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="start nothing: check flags, count memory and traffic at any --ranks"
        ),
    ] = False,
) -> None:
    """Train with Megatron: runs torchrun for you, prints its command, keeps its log.

    What no option says, the recipe says; what it does not say is as published (infoentropy, gamma
    1, sigma 1, paper), seed 1234, one shard, one stage. A dry run needs no folders; given all of
    them it also prints the command.
    """
    from megatron_infoentropy.launch import train as launch
    from megatron_infoentropy.launch.job import TrainingJob, require_places

    settings = training_settings(
        objective, gamma, sigma, normalization, seed, tensor_parallel, pipeline_parallel
    )
    extra = tuple(megatron_flags or ())
    if dry_run:
        from megatron_infoentropy.launch import dry_run as dry

        for line in dry.report(
            dry.dry_run(recipe, settings, extra, tokenizer=tokenizer, ranks=ranks)
        ):
            out.print(line)
        if None in (data, tokenizer, run):
            return
    places = require_places(data=data, tokenizer=tokenizer, run=run)
    job = TrainingJob(recipe, *places, settings, ranks, extra, switch)
    command = launch.build_command(job)
    warn(command.words)
    out.print(str(command))
    if not dry_run:
        said = launch.train(job, command)
        out.print(said.outcome())
        goes_on = "next: the same command goes on from there"
        out.print(goes_on if said.was_stopped else next_step(job.run, job.tokenizer))


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
    cpus_per_task: Annotated[
        int | None,
        typer.Option(min=1, help="Slurm: CPUs of a node, for all its ranks; default: all"),
    ] = None,
    mem: Annotated[
        str | None, typer.Option(help="Slurm: memory of a node, such as 64G; default: all")
    ] = None,
    max_requeues: Annotated[
        int | None,
        typer.Option(min=0, help="Slurm: times that the job may start again; default: any"),
    ] = None,
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
) -> None:
    """Train on any number of machines: writes readable scripts for torchrun, ssh or Slurm, starts
    them.

    On one machine as `infoentropy train`, with restarts. The scripts lie in the run folder: node.sh
    (what a node runs), hosts.sh or job.slurm; they can be edited and started by hand. SIGUSR1, or
    whatever Slurm ends a job with, saves a checkpoint first; the same command goes on from it.
    """
    from megatron_infoentropy.launch import cluster as machines
    from megatron_infoentropy.launch import scripts as launching
    from megatron_infoentropy.launch.job import TrainingJob, require_places

    settings = training_settings(
        objective, gamma, sigma, normalization, seed, tensor_parallel, pipeline_parallel
    )
    places = require_places(data=data, tokenizer=tokenizer, run=run)
    extra = tuple(megatron_flags or ())
    job = TrainingJob(recipe, *places, settings, extra_flags=extra, switch=switch)
    named = () if hosts is None else machines.parse_hosts(hosts)
    cluster = machines.Cluster(
        nodes=nodes or len(named) or 1,
        gpus_per_node=gpus_per_node,
        ranks_per_node=ranks_per_node,
        hosts=named,
        slurm=machines.sbatch_options(slurm, {"--cpus-per-task": cpus_per_task, "--mem": mem}),
        image=container_image,
        engine=container_engine or ("pyxis" if slurm is not None else "apptainer"),
        mounts=tuple(container_mount or ()),
        interface=interface,
        address=rdzv_endpoint,
        max_restarts=max_restarts,
        join_timeout_s=join_timeout,
        store_timeout_s=store_timeout,
        save_s=save_seconds,
        max_requeues=max_requeues,
        python=python or ("python" if container_image else sys.executable),
    )
    made_by = " ".join(shlex.join(["infoentropy", *sys.argv[1:]]).split())  # one line: a comment
    plan = launching.prepare(job, cluster, made_by)
    warn(list(plan.flags))
    paths = launching.write(plan, overwrite=overwrite)
    for path in paths:
        out.print(f"== {path}")
        if dry_run:
            out.print(path.read_text(encoding="utf-8"))
    if dry_run or plan.by_hand:
        launching.record(plan, recipe, is_start=not dry_run)
        for line in launching.how_to_start(plan):
            out.print(line)
        return
    out.print(launching.start(plan, recipe))


Verify = Annotated[
    bool | None,
    typer.Option(
        "--verify/--no-verify",
        help="compare what both models compute; default: if memory allows. Files always are",
    ),
]
ProofText = Annotated[
    Path | None, typer.Option(help="text file to compare on; default: Python's reference texts")
]
ProofData = Annotated[
    Path | None,
    typer.Option(help="instead of --text an indexed dataset to compare on: its path without .bin"),
]


def convert(
    checkpoint: Annotated[Path, typer.Argument(help="Megatron --save folder, or an iter_ folder")],
    output: Annotated[Path, typer.Option(help="Hugging Face folder to write")],
    tokenizer: Annotated[Path, typer.Option(help="Hugging Face tokenizer folder to copy")],
    family: Annotated[
        str, typer.Option(help="of a model with --add-qkv-bias: qwen2, llama, or auto")
    ] = "auto",
    dtype: Annotated[
        str, typer.Option(help="float32, bfloat16, float16, or auto: as saved")
    ] = "auto",
    iteration: Annotated[int | None, typer.Option(help="which one; default: the latest")] = None,
    verify: Verify = None,
    text: ProofText = None,
    data: ProofData = None,
    checksums: Annotated[
        bool, typer.Option(help="first compare all of the checkpoint with its manifest")
    ] = True,
    rope_scaling_factor: Annotated[
        float | None, typer.Option(help="trained with, where the checkpoint's trainer did not say")
    ] = None,
    overwrite: Overwrite = False,
) -> None:
    """Export a Megatron checkpoint, of any layout, as a Hugging Face model, and prove it."""
    from megatron_infoentropy.convert import Proof, convert_checkpoint

    done = convert_checkpoint(
        checkpoint,
        output,
        tokenizer=tokenizer,
        family=family,
        dtype=dtype,  # type: ignore[arg-type]
        iteration=iteration,
        overwrite=overwrite,
        checksums=checksums,
        rope_scaling_factor=rope_scaling_factor,
        check=Proof(out.print, verify, text, data),
    )
    out.print(f"{output}: {done.family}, {done.parameters} parameters, {done.dtype}")
    if done.not_qwen2:
        out.print(f"Llama, its o_proj.bias zero, and not Qwen2: {done.not_qwen2}; see --family")


def convert_from_hf(
    model: Annotated[Path, typer.Argument(help="Hugging Face model folder")],
    output: Annotated[Path, typer.Option(help="folder to write, for --pretrained-checkpoint")],
    hybrid: Annotated[
        bool, typer.Option("--hybrid", help="of Megatron's HybridModel, not of its GPTModel")
    ] = False,
    verify: Verify = None,
    text: ProofText = None,
    data: ProofData = None,
    overwrite: Overwrite = False,
) -> None:
    """Make a Megatron checkpoint of a Hugging Face model, to train it further, and prove it."""
    from megatron_infoentropy.convert import Proof
    from megatron_infoentropy.convert import convert_from_hf as run
    from megatron_infoentropy.launch.recipe import to_command_line

    done = run(
        model,
        output,
        hybrid=hybrid,
        overwrite=overwrite,
        check=Proof(out.print, verify, text, data, imported=True),
    )
    out.print(f"{output}: {done.family}, {done.parameters} parameters, {done.dtype}")
    words = shlex.join(to_command_line(done.flags))
    out.print(f"Megatron flags (also in {output / 'model.yaml'}): {words}")
