"""Which loss a checkpoint was trained with, and whether this run goes on with the same.

Megatron saves all arguments in every checkpoint, ours among them: a run can prove its objective.
"""

import argparse
import copy
import dataclasses
from typing import Any

from megatron_infoentropy.config import MEANS, InfoEntropyConfig
from megatron_infoentropy.integration.arguments import PREFIX


def other_objective(saved: argparse.Namespace, config: InfoEntropyConfig) -> str | None:
    """A sentence that names both objectives where a checkpoint's differs from `config`, else None.

    saved: the arguments in the checkpoint.
    """
    fields = [f for f in dataclasses.fields(InfoEntropyConfig) if f.name not in MEANS]
    whose = "the checkpoint was trained with"
    if not hasattr(saved, f"{PREFIX}_objective"):
        theirs = dataclasses.replace(config, **_defaults(fields) | {"objective": "cross_entropy"})
        whose += " Megatron's own cross entropy,"
    else:
        # A checkpoint of an earlier version lacks the newer fields: they had their defaults.
        before = {
            name: getattr(saved, f"{PREFIX}_{name}", default)
            for name, default in _defaults(fields).items()
        }
        theirs = dataclasses.replace(config, **before)
    theirs, ours = theirs.effective(), config.effective()
    if theirs == ours:
        return None
    return (
        f"{whose} {_words(theirs, ours, fields)} and this run goes on with "
        f"{_words(ours, theirs, fields)}"
    )


def _defaults(fields: list[dataclasses.Field[Any]]) -> dict[str, Any]:
    return {f.name: f.default for f in fields}


def _words(
    config: InfoEntropyConfig, other: InfoEntropyConfig, fields: list[dataclasses.Field[Any]]
) -> str:
    """The objective and what else differs."""
    different = [
        f"{f.name}={getattr(config, f.name)}"
        for f in fields
        if f.name != "objective" and getattr(config, f.name) != getattr(other, f.name)
    ]
    return " ".join([f"objective={config.objective}", *different])


def saved_arguments(args: argparse.Namespace) -> argparse.Namespace | None:
    """The arguments in the checkpoint that `--load` names; None where there is none yet."""
    if not args.load:
        return None
    from megatron.training.checkpointing import load_args_from_checkpoint

    # It changes what it is given, and returns that alone where it finds nothing.
    found = load_args_from_checkpoint(copy.deepcopy(args))
    return found[1] if isinstance(found, tuple) else None
