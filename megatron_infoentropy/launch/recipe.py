"""A recipe: Megatron's own flags, as YAML in named sections, readable top to bottom.

    model:
      num-layers: 4        # --num-layers 4
      swiglu: true         # --swiglu
      disable-bias-linear: false   # left out
      betas: [1, 2]        # --betas 1 2

The section names are for the reader. Keys are Megatron's flags (or --infoentropy-*) without dashes.
"""

from pathlib import Path
from typing import Any

import yaml


class RecipeError(ValueError):
    """A recipe that cannot be turned into flags; says where and what to do."""


def load_recipe(path: Path) -> dict[str, Any]:
    """{flag name: value} of a recipe file, in order.

    Raises:
        RecipeError: not YAML, not sections of flags, or a flag named twice.
    """
    try:
        sections = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RecipeError(f"no recipe at {path}; the examples folder has some") from None
    except yaml.YAMLError as error:
        raise RecipeError(f"{path} is not YAML: {error}") from error
    if not isinstance(sections, dict):
        raise RecipeError(f"{path}: expected sections of flags, got {type(sections).__name__}")
    flags: dict[str, Any] = {}
    for section, entries in sections.items():
        if not isinstance(entries, dict):
            raise RecipeError(
                f"{path}: section {section!r} must hold `flag: value` lines, got {entries!r}"
            )
        for name, value in entries.items():
            if name in flags:
                raise RecipeError(f"{path}: flag {name!r} is given twice")
            if isinstance(value, dict):
                raise RecipeError(f"{path}: flag {name!r} has a section as its value")
            flags[name] = value
    return flags


def to_command_line(flags: dict[str, Any]) -> list[str]:
    """["--num-layers", "4", "--swiglu", ...]; False and None leave a flag out."""
    words: list[str] = []
    for name, value in flags.items():
        if value is None or value is False:
            continue
        words.append(f"--{name}")
        if value is not True:
            words += [str(v) for v in value] if isinstance(value, list) else [str(value)]
    return words
