"""Which loss a checkpoint was trained with, and whether this run goes on with the same.

Megatron saves all arguments in every checkpoint, ours among them: a run can prove its objective.
"""

import argparse
import copy
import dataclasses
from typing import Any

from megatron_infoentropy.config import MEANS, InfoEntropyConfig
from megatron_infoentropy.integration.arguments import PREFIX

IGNORANT_FACTOR = 8.0  # of rotary scaling, where a trainer does not hand on --rope-scaling-factor


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


def check_rope_scaling(saved: argparse.Namespace | None, args: argparse.Namespace) -> None:
    """Refuse to go on, with another rotary scaling, from a trainer that ignored the argument.

    Raises:
        ValueError: the checkpoint's trainer does not say that its model had the factor.
    """
    if saved is None or not getattr(saved, "use_rope_scaling", False):
        return
    said, ours = saved.rope_scaling_factor, args.rope_scaling_factor
    if hasattr(saved, f"{PREFIX}_rope_scaling_factor") or IGNORANT_FACTOR in (said, ours):
        return
    raise ValueError(
        f"the checkpoint says --rope-scaling-factor {said:g}, but its trainer does not say that it "
        f"obeyed: Megatron-Core up to 0.19.2 trains with {IGNORANT_FACTOR:g} whatever is asked "
        f"for; go on with --rope-scaling-factor {IGNORANT_FACTOR:g}, or, if you know that the "
        f"model has {said:g}, start from a copy that `infoentropy convert --rope-scaling-factor "
        f"{said:g}` and `infoentropy convert-from-hf` make"
    )


def saved_arguments(args: argparse.Namespace) -> argparse.Namespace | None:
    """The arguments in the checkpoint that `--load` names; None where there is none yet."""
    if not args.load:
        return None
    from megatron.training.checkpointing import load_args_from_checkpoint

    # It changes what it is given, and returns that alone where it finds nothing.
    found = load_args_from_checkpoint(copy.deepcopy(args))
    return found[1] if isinstance(found, tuple) else None
