"""README.md of an exported folder: what the model is, and how it was trained, in facts only."""

import json
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from megatron_infoentropy.convert.architecture import Architecture
from megatron_infoentropy.convert.checkpoint import MegatronCheckpoint
from megatron_infoentropy.convert.families import CLASSES

_PREFIX = "infoentropy_"
_OBJECTIVE = ("objective", "gamma", "sigma", "normalization")
_HOW_COMPUTED = ("backend", "collective", "fused_linear", "chunk_tokens")  # not what is computed


def model_card(checkpoint: MegatronCheckpoint, model: Architecture, parameters: int) -> str:
    """Return Markdown with the objective, data, sizes, versions and commits that are known."""
    run = _run_facts(checkpoint.folder)
    args = vars(checkpoint.args)
    facts = {
        **{name: run.get(name, args.get(_PREFIX + name)) for name in _OBJECTIVE},
        "other settings of the loss": _other_settings(args),
        "data": _data(args),
        "iterations": checkpoint.iteration,
        "samples": args.get("consumed_train_samples"),
        "sequence length": args.get("seq_length"),
        "seed": run.get("seed", args.get("seed")),
        "trained in": args.get("params_dtype"),
        "versions at training": run.get("versions"),
        "commit at training": run.get("versions", {}).get("commit"),
        "exported by": f"megatron_infoentropy {_version()}",
        "commit at export": _commit(),
    }
    rows = "\n".join(f"| {name} | {_text(value)} |" for name, value in facts.items())
    objective = facts["objective"] or "an objective that was not recorded"
    return (
        "---\nlibrary_name: transformers\npipeline_tag: text-generation\n"
        "tags: [megatron, infoentropy]\n---\n\n"
        f"# {CLASSES[model.family]} with {parameters:,} parameters\n\n"
        f"Pre-trained with Megatron-Core on {objective} and exported from "
        f"`{checkpoint.folder.name}`. The InfoEntropy loss weights each token's cross entropy by "
        "(sigma + entropy)^gamma; gamma 0 is plain cross entropy.\n\n"
        f"| what | value |\n|---|---|\n{rows}\n"
    )


def _run_facts(folder: Path) -> dict[str, Any]:
    """run.json of a run folder, RUN/checkpoints/iter_..., if the checkpoint is in one."""
    path = folder.parent.parent / "run.json"
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return facts if isinstance(facts, dict) else {}


def _other_settings(args: dict[str, Any]) -> dict[str, Any]:
    settings = {k.removeprefix(_PREFIX): v for k, v in args.items() if k.startswith(_PREFIX) and v}
    return {k: v for k, v in settings.items() if k not in (*_OBJECTIVE, *_HOW_COMPUTED)}


def _data(args: dict[str, Any]) -> str | None:
    """Names of the datasets, without the folders of the machine they were on."""
    paths = args.get("train_data_path") or args.get("data_path")
    if not isinstance(paths, list):
        return None
    return " ".join(Path(str(path)).name for path in paths)


def _text(value: object) -> str:
    if value is None or value == {}:
        return "not recorded"
    if isinstance(value, dict) and value:
        return ", ".join(f"{name} {item}" for name, item in value.items())
    return str(value)


def _version() -> str:
    try:
        return version("megatron-infoentropy")
    except PackageNotFoundError:
        return "not installed"


def _commit() -> str | None:
    """The commit of the tree that this file is in; None where it is installed from a wheel."""
    here = Path(__file__).parents[2]
    if not (here / ".git").exists():
        return None
    try:
        done = subprocess.run(
            ["git", "rev-parse", "HEAD"],
            cwd=here,
            capture_output=True,
            text=True,
            check=True,
            errors="replace",
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
