"""`preprocess` as tasks of datatrove: on this machine, as Slurm jobs, or on a Ray cluster.

A task is a shard of the inputs; a last one, which depends on them, merges them into the output.
Marks of completion, logs, arrays and requeueing are datatrove's; nothing else imports it. The
folder `OUT.shards` has the shards and, by what was asked for, marks and logs.
"""

import hashlib
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from importlib import import_module
from inspect import signature
from pathlib import Path
from typing import Any, get_type_hints

from megatron_infoentropy.data import preprocess as single
from megatron_infoentropy.data.manifest import MANIFEST, OUTPUT_FILES, Manifest, load_manifest
from megatron_infoentropy.data.rewrite import merge
from megatron_infoentropy.data.tokenizer import load_tokenizer
from megatron_infoentropy.data.workers import python_for
from megatron_infoentropy.files import require_free
from megatron_infoentropy.runtime.orphans import end_with, leave_none

_OURS = ("pipeline", "tasks", "depends", "logging_dir", "skip_completed")


def run_tasks(
    kind: str, tasks: int, given: Sequence[str], *, say: Callable[[str], object], **asked: Any
) -> Manifest | None:
    """Make what `preprocess(**asked)` makes, in shards and a merge; None when they are queued.

    `kind` is local, slurm or ray, `given` are KEY=VALUE for datatrove's executor; `say` is told
    of the engine that all shards use. Called again after whatever ended it, the same call does
    what is missing.

    Raises:
        ValueError: an unknown executor or option, more tasks than files, an unusable output.
        RuntimeError: datatrove, Slurm or Ray is not there; a task failed, with its reason.
    """
    make = _executor(kind)
    chosen = _options(kind, make, given, asked["workers"])
    single.require_usable(asked["inputs"], asked["workers"], asked["max_errors"])
    single.require_parts(asked["inputs"])
    inputs = asked["inputs"] = [path.resolve() for path in asked["inputs"]]
    if not 1 <= tasks <= len(inputs):
        raise ValueError(f"--tasks must be 1 to {len(inputs)}, the number of files; got {tasks}")
    asked["tokenizer"] = asked["tokenizer"].resolve()
    loaded = load_tokenizer(asked["tokenizer"])
    files, output = list(map(single.input_of, inputs)), asked["output"].resolve()
    whole = single.Task(files, output, loaded, asked["options"], None, "")
    if whole.is_done():
        return load_manifest(output)
    require_free(output, OUTPUT_FILES, asked["overwrite"])
    asked["engine"] = single.engine_for(asked["engine"], whole, say)  # for all shards
    parts, last = _executors(partial(make, **chosen), tasks, whole, asked)
    if kind == "slurm":
        last.depends = parts
        try:
            last.run()
        except subprocess.CalledProcessError as error:  # it has said why
            raise RuntimeError(f"sbatch refused a job, exit code {error.returncode}") from error
        return None
    leave_none()  # else datatrove's manager process outlives this one, if that is killed
    for executor in (parts, last):
        executor.run()
        if failed := executor.get_incomplete_ranks():  # Ray's does not raise
            raise RuntimeError(f"tasks {failed} failed: see {executor.logging_dir.path}/logs")
    return load_manifest(output)


def _executor(kind: str) -> Any:
    if kind not in ("local", "slurm", "ray"):
        raise ValueError(f"--executor must be local, slurm or ray, got {kind!r}")
    if kind == "slurm" and shutil.which("sbatch") is None:
        raise RuntimeError("--executor slurm needs sbatch: give the command where jobs are queued")
    try:
        executors = import_module("datatrove.executor")
        if kind == "ray":
            import_module("ray")
    except ModuleNotFoundError as error:
        cure = "ray" if error.name == "ray" else "'megatron-infoentropy[cluster]'"
        raise RuntimeError(f"--executor {kind} needs {error.name}: pip install {cure}") from error
    return getattr(executors, f"{kind.title()}PipelineExecutor")


def _options(kind: str, make: Any, given: Sequence[str], workers: int) -> dict[str, Any]:
    """Return the executor's arguments; what is no text is written as in JSON."""
    chosen: dict[str, Any] = {"cpus_per_task": workers + 1}  # one reads and writes
    if kind == "local":  # spawned, the pool ends with this process
        cores = len(os.sched_getaffinity(0))
        chosen = {"workers": max(1, cores // workers), "start_method": "spawn"}
    hints, ours = get_type_hints(make.__init__), dict.fromkeys(_OURS)
    try:
        for word in given:
            name, _, text = word.partition("=")
            chosen[name] = text
            with suppress(json.JSONDecodeError):
                chosen[name] = text if hints.get(name, str) is str else json.loads(text)
            if not isinstance(chosen[name], hints.get(name, str)):
                raise TypeError(f"{word} should be of type {hints[name]}")
        signature(make).bind(**ours, **chosen)
    except TypeError as error:
        names = ", ".join(sorted(signature(make).parameters.keys() - ours.keys()))
        raise ValueError(f"--executor {kind}: {error}; --executor-option has {names}") from error
    if kind == "slurm":  # a minute before its time limit a task requeues itself
        # What depends on a task that has failed would stay queued for ever.
        ours_too = {"signal": "USR1@60", "kill-on-invalid-dep": "yes"}
        chosen["sbatch_args"] = ours_too | chosen.get("sbatch_args", {})
        if not chosen.keys() & {"env_command", "condaenv", "venv_path"}:
            chosen["env_command"] = f'export PATH="{Path(sys.executable).parent}:$PATH"'
    return chosen


def _executors(make: Any, tasks: int, whole: single.Task, asked: dict[str, Any]) -> list[Any]:
    """Return what makes the shards and what joins them; marks of what is not there are removed."""
    folder = whole.output.with_name(f"{whole.output.name}.shards")
    shards = [folder / single.shard_name((index, tasks)) for index in range(tasks)]
    job = hashlib.sha256(json.dumps([whole.job(), tasks]).encode()).hexdigest()[:12]
    logs = folder / f"tasks-{job}"
    (logs / "merge/completions/00000").unlink(missing_ok=True)
    for index, shard in enumerate(shards):
        if not (shard / MANIFEST).is_file():
            (logs / f"shards/completions/{index:05d}").unlink(missing_ok=True)
    asked["output"] = folder
    parts = make(
        [partial(_make_shard, asked, os.getpid())], tasks=tasks, logging_dir=f"{logs}/shards"
    )
    join = partial(_merge, shards, whole.output, asked["overwrite"])
    return [parts, make([join], tasks=1, workers=1, logging_dir=f"{logs}/merge")]


def _make_shard(asked: dict[str, Any], launcher: int, _: Any, rank: int, tasks: int) -> None:
    """Be a task: wait for a process, since a local pool does not notice when a task is killed."""
    if os.getpid() != launcher:
        end_with(os.getppid())
    request = pickle.dumps((asked | {"shard": (rank, tasks)}, os.getpid()))
    lines = os.environ | {"TTY_COMPATIBLE": "0"}  # of progress, as bars would mix
    done = subprocess.run(
        python_for(main), input=request, stdout=subprocess.PIPE, env=lines, check=False
    )
    if done.returncode:
        reason = done.stdout.decode(errors="replace") or f"exit code {done.returncode}"
        raise RuntimeError(f"shard {rank}/{tasks}: {reason}; give the same command again")


def main() -> None:
    """Make the shard that is asked for on standard input; an error is a sentence on the output."""
    asked, parent = pickle.load(sys.stdin.buffer)
    end_with(parent)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # Slurm's, for the task that requeues itself
    try:
        single.preprocess(**asked)
    except (ValueError, RuntimeError, OSError) as error:
        sys.stdout.write(str(error))
        sys.exit(1)


def _merge(shards: list[Path], output: Path, overwrite: bool, *_: Any) -> None:
    merge(shards, output, overwrite=overwrite)
