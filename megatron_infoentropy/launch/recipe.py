"""A recipe: Megatron's own flags, as YAML in named sections, readable top to bottom.

    model:
      num-layers: 4        # --num-layers 4
      swiglu: true         # --swiglu
      disable-bias-linear: false   # left out
      betas: [1, 2]        # --betas 1 2
    launch:                # the one section that is not Megatron's
      ranks: 128           # what the layout was planned for; --dry-run counts with it
      data-weights: paper  # as in `infoentropy blend`; of the training data only

The other section names are for the reader. Keys are Megatron's flags (or --infoentropy-*) without
dashes.
"""

import reprlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

LAUNCH = "launch"
MERGE = "tag:yaml.org,2002:merge"


class RecipeError(ValueError):
    """A recipe that cannot be turned into flags; says where and what to do."""


@dataclass(frozen=True)
class Plan:
    """A recipe's `launch` section."""

    ranks: int | None = None
    data_weights: str = "natural"


def read_yaml(path: Path) -> Any:
    """What a file holds; a key that is given twice is an error.

    Raises:
        OSError: it cannot be read.
        ValueError: it is not YAML that can be used, with what is wrong.
    """
    try:
        return _StrictLoader(path.read_text(encoding="utf-8")).get_single_data()
    # Dates of no calendar, bytes that are no text, brackets without end are no YAMLError.
    except (yaml.YAMLError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} is not YAML that can be used: {error}") from error


class _StrictLoader(yaml.SafeLoader):
    """Refuses a key that is given twice, of which YAML's readers take the last one."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        given: set[object] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != MERGE:
                if key.value in given:
                    where = key.start_mark.line + 1
                    raise ValueError(f"line {where}: {key.value!r} is given twice")
                given.add(key.value)
        return super().construct_mapping(node, deep)


def load_recipe(path: Path) -> dict[str, Any]:
    """{flag name: value} of a recipe file, in order, without its `launch` section.

    Raises:
        RecipeError: not YAML, not sections of flags, or a flag named twice.
    """
    flags: dict[str, Any] = {}
    for section, entries in _sections(path).items():
        for name, value in entries.items():
            if section == LAUNCH:
                continue
            if name in flags:
                raise RecipeError(f"{path}: flag {name!r} is given twice")
            if not isinstance(name, str):
                raise RecipeError(f"{path}: expected the name of a flag, got {name!r}")
            values = value if isinstance(value, list) else [value]
            if any(isinstance(item, dict | list | set | tuple) for item in values):
                raise RecipeError(f"{path}: flag {name!r} has a section as its value")
            flags[name] = value
    return flags


def load_plan(path: Path) -> Plan:
    """What a recipe's `launch` section says, or would if it had one.

    Raises:
        RecipeError: no recipe, or keys other than `ranks`, 1 or more, and `data-weights`, a word.
    """
    entries = _sections(path).get(LAUNCH, {})
    kinds: dict[str, type] = {"ranks": int, "data-weights": str}
    for name, value in entries.items():
        if name not in kinds:
            raise RecipeError(
                f"{path}: {LAUNCH} has no setting {name!r}, only {' and '.join(kinds)}; Megatron's "
                "flags belong to another section"
            )
        if not isinstance(value, kinds[name]) or isinstance(value, bool):
            raise RecipeError(
                f"{path}: {LAUNCH}: {name} must be of type {kinds[name].__name__}, got "
                f"{reprlib.repr(value)}"
            )
    if entries.get("ranks", 1) < 1:
        raise RecipeError(f"{path}: {LAUNCH}: ranks must be at least 1, got {entries['ranks']}")
    return Plan(**{name.replace("-", "_"): value for name, value in entries.items()})


def _sections(path: Path) -> dict[str, dict[str, Any]]:
    try:
        sections = read_yaml(path)
    except FileNotFoundError:
        raise RecipeError(f"no recipe at {path}; the examples folder has some") from None
    except ValueError as error:
        raise RecipeError(str(error)) from error
    if not isinstance(sections, dict):
        raise RecipeError(f"{path}: expected sections of flags, got {type(sections).__name__}")
    for section, entries in sections.items():
        if not isinstance(entries, dict):
            raise RecipeError(
                f"{path}: section {section!r} must hold `flag: value` lines, got "
                f"{reprlib.repr(entries)}"
            )
    return sections


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
