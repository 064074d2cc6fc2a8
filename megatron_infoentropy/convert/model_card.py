"""README.md of an exported folder: what the model is, and how it was trained, in facts only."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from megatron_infoentropy import __version__
from megatron_infoentropy.config import MEANS, InfoEntropyConfig
from megatron_infoentropy.convert.architecture import CLASSES, Architecture
from megatron_infoentropy.convert.checkpoint import MegatronCheckpoint, read_object
from megatron_infoentropy.files import commit_of

BASE = "hf_model"  # in the arguments of a checkpoint that was converted: the model's name
_PREFIX = "infoentropy_"
_OBJECTIVE = ("objective", "gamma", "sigma", "normalization")


def model_card(checkpoint: MegatronCheckpoint, model: Architecture, parameters: int) -> str:
    """Return Markdown with the objective, data, sizes, versions and commits that are known."""
    args = vars(checkpoint.args)
    run = _run_facts(checkpoint.folder)
    versions = run.get("versions") or {}
    facts = {name: run.get(name, args.get(_PREFIX + name)) for name in _OBJECTIVE} | {
        "other settings of the loss": _other_settings(args),
        "data": _data(args),
        "iterations": checkpoint.iteration,
        "samples": args.get("consumed_train_samples"),
        "sequence length": args.get("seq_length"),
        "seed": run.get("seed", args.get("seed")),
        "trained in": args.get("params_dtype"),
        "versions at training": _listed(versions),
        "commit at training": versions.get("commit"),
        "exported by": f"megatron_infoentropy {__version__}",
        "commit at export": commit_of(Path(__file__).parents[2]),
    }
    rows = "\n".join(f"| {k} | {'not recorded' if v is None else v} |" for k, v in facts.items())
    base = _base_model(args)
    of_base = f"base_model: {json.dumps(base)}\nbase_model_relation: finetune\n" if base else ""
    return (
        "---\nlibrary_name: transformers\npipeline_tag: text-generation\n"
        f"tags: [megatron, infoentropy]\n{of_base}---\n\n"
        f"# {CLASSES[model.family]} with {parameters:,} parameters\n\n"
        f"{_how_made(args, facts['objective'], base)} Exported from `{checkpoint.folder.name}`. "
        "The InfoEntropy loss weights each token's cross entropy by (sigma + entropy)^gamma; "
        "gamma 0 is plain cross entropy.\n\n"
        f"| what | value |\n|---|---|\n{rows}\n"
    )


def _how_made(args: dict[str, Any], objective: object, base: str | None) -> str:
    if args.get(BASE):
        return f"Converted from `{base}`, and not trained since."
    start = base or args.get("pretrained_checkpoint")
    training = f"with Megatron-Core on {objective or 'an objective that was not recorded'}"
    if start:
        return f"Trained further, from `{Path(start).name if start != base else base}`, {training}."
    return f"Pre-trained {training}."


def _base_model(args: dict[str, Any]) -> str | None:
    """Return the Hugging Face model that was converted to start from, as far as it is known.

    The checkpoint made of it says; that of a training names this checkpoint, if it is there still.
    """
    name, start = args.get(BASE), args.get("pretrained_checkpoint")
    if name is None and isinstance(start, str):
        try:
            name = vars(MegatronCheckpoint(Path(start)).args).get(BASE)
        except (ValueError, OSError):
            return None
    return name if isinstance(name, str) else None


def _run_facts(folder: Path) -> dict[str, Any]:
    """Return run.json of a run folder, RUN/checkpoints/iter_..., if the checkpoint is in one."""
    try:
        return read_object(folder.parent.parent / "run.json")
    except (OSError, ValueError):
        return {}


def _other_settings(args: dict[str, Any]) -> str | None:
    """Return what changes the loss and has another value than by default."""
    usual = {field.name: field.default for field in dataclasses.fields(InfoEntropyConfig)}
    usual["whole_pieces"] = False  # of the trainer: the last token of a piece is not in the loss
    given = {name: args.get(_PREFIX + name) for name in usual if name not in (*_OBJECTIVE, *MEANS)}
    return _listed({k: v for k, v in given.items() if v is not None and v != usual[k]})


def _data(args: dict[str, Any]) -> str | None:
    """Return the datasets' names, without the folders of the machine they were on."""
    paths = args.get("train_data_path") or args.get("data_path")
    return " ".join(Path(str(path)).name for path in paths) if isinstance(paths, list) else None


def _listed(values: dict[str, Any]) -> str | None:
    return ", ".join(f"{name} {value}" for name, value in values.items()) or None
