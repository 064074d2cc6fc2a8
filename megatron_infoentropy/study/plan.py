"""A study file, read and checked before anything is started.

recipe: ../tiny.yaml            # as for `infoentropy train`; paths are relative to this file
flags: {train-iters: 600}       # Megatron's, over the recipe's, the same for every run
seeds: [1, 2, 3]
grid:                           # lists are crossed; with them, every seed
  - objective: cross_entropy
  - objective: infoentropy
    gamma: [0.5, 1, 2]
    normalization: [paper, global]
data: {corpus-megabytes: 12, vocab-size: 4096}
evaluate: {split: test, max-tokens: 200000}

Each error names the key, the value and what to do.
"""

from collections.abc import Collection
from dataclasses import dataclass
from itertools import product
from math import inf
from pathlib import Path
from typing import Any

from megatron_infoentropy.config import InfoEntropyConfig
from megatron_infoentropy.launch.recipe import (
    load_plan,
    load_recipe,
    loss_flags,
    read_facts,
    read_yaml,
    written_flags,
)

SPLITS = ("train", "validation", "test")
_LOSS = {"objective": str, "gamma": float, "sigma": float, "normalization": str}
_PARTS = ("recipe", "flags", "seeds", "grid", "data", "evaluate", "tasks")
_WORDS: dict[type, str] = {str: "a word", int: "a whole number", float: "a number"}


class StudyError(ValueError):
    """A study that cannot be done as it is written, or a folder that belongs to something else."""


@dataclass(frozen=True)
class Data:
    """What to train on: token datasets that are there, or text to make them of."""

    tokens: Path | None = None  # with train/, validation/ and test/
    text: Path | None = None  # with train.jsonl, validation.jsonl, test.jsonl, or .zst, or .gz
    corpus_megabytes: float | None = None  # of the standard library, as `infoentropy corpus`
    tokenizer: Path | None = None
    vocab_size: int | None = None  # of a tokenizer to train


@dataclass(frozen=True)
class ScoringPlan:
    """How models are scored."""

    split: str = "test"
    max_tokens: int | None = None
    device: str = "auto"


@dataclass(frozen=True)
class Tasks:
    """What lm-evaluation-harness asks the models, as for `infoentropy tasks`."""

    suites: tuple[str, ...] = ()
    names: tuple[str, ...] = ()
    folder: Path | None = None
    limit: int | None = None


@dataclass(frozen=True)
class Member:
    """One run of the grid: a setting and a seed."""

    name: str
    loss: dict[str, Any]  # fields of InfoEntropyConfig
    seed: int


@dataclass(frozen=True)
class Study:
    """A study file; `recipe` and every path below `data` are absolute."""

    path: Path
    recipe: Path
    flags: dict[str, Any]
    members: tuple[Member, ...]
    data: Data
    scoring: ScoringPlan
    tasks: Tasks | None = None

    @property
    def name(self) -> str:
        return self.path.stem

    def settings(self, member: Member) -> dict[str, Any]:
        """Return the flags of a run beside the recipe's."""
        return {**self.flags, **loss_flags(member.loss), "seed": member.seed}

    def member(self, name: str) -> Member:
        """Return the run of that name.

        Raises:
            StudyError: the grid has none.
        """
        for member in self.members:
            if member.name == name:
                return member
        raise StudyError(
            f"{self.path} has no run {name!r}; its runs are "
            + ", ".join(member.name for member in self.members)
        )


def load_study(path: Path) -> Study:
    """Read and check a study file, and the flags of every run.

    Raises:
        StudyError: not YAML, an unknown key, a value that cannot be, or a run that is there twice.
        RecipeError: its recipe is none.
    """
    path = path.resolve()
    try:
        content = read_yaml(path)
    except FileNotFoundError:
        raise StudyError(f"no study at {path}; examples/studies has some") from None
    except ValueError as error:
        raise StudyError(str(error)) from error
    try:
        study = _study(path, _section("the study", content, _PARTS, required=("recipe", "grid")))
    except StudyError as error:
        raise StudyError(f"{path}: {error}") from None
    load_plan(study.recipe)
    recipe = load_recipe(study.recipe)
    for member in study.members:
        try:
            read_facts(written_flags(recipe, study.settings(member)))
        except ValueError as error:
            raise StudyError(f"{path}: {member.name} cannot be trained: {error}") from None
    return study


def _study(path: Path, content: dict[str, Any]) -> Study:
    recipe = path.parent / _checked("recipe", content["recipe"], str)
    if not recipe.is_file():
        raise StudyError(f"recipe: there is no file {recipe}")
    flags = content.get("flags") or {}
    if not isinstance(flags, dict) or not all(isinstance(name, str) for name in flags):
        raise StudyError(f"flags: expected `flag: value` lines, got {flags!r}")
    return Study(
        path,
        recipe,
        flags,
        _members(content),
        _data(path.parent, content.get("data")),
        _scoring(content.get("evaluate")),
        _tasks(path.parent, content["tasks"]) if "tasks" in content else None,
    )


def _members(content: dict[str, Any]) -> tuple[Member, ...]:
    """Return every setting with the first seed, then with the next: so that a study that ends
    early has compared something."""
    seeds = [_checked("seeds", seed, int) for seed in _listed(content.get("seeds", [1234]))]
    grid = content["grid"]
    if not isinstance(grid, list) or not grid or not seeds:
        raise StudyError("grid and seeds: expected lists with at least one entry")
    settings = [setting for entry in grid for setting in _settings(entry)]
    members = [Member(_name(loss, seed), loss, seed) for seed in seeds for loss in settings]
    names = [member.name for member in members]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise StudyError(f"grid: {', '.join(twice)} would be trained twice")
    return tuple(members)


def _settings(entry: object) -> list[dict[str, Any]]:
    """Return the settings that one entry of the grid crosses."""
    given = _section("grid", entry, tuple(_LOSS), required=("objective",))
    axes = [
        [_checked(f"grid: {name}", value, _LOSS[name]) for value in _listed(values)]
        for name, values in given.items()
    ]
    settings = [dict(zip(given, values, strict=True)) for values in product(*axes)]
    for setting in settings:
        try:
            InfoEntropyConfig(**setting)
        except ValueError as error:
            raise StudyError(f"grid: {error}") from error
        if setting["objective"] == "cross_entropy" and len(setting) > 1:
            raise StudyError("grid: cross_entropy has no gamma, sigma or normalization")
    return settings


def _name(loss: dict[str, Any], seed: int) -> str:
    words = [loss["objective"]]
    words += [f"gamma{loss['gamma']:g}"] if "gamma" in loss else []
    words += [f"sigma{loss['sigma']:g}"] if "sigma" in loss else []
    words += [loss["normalization"]] if "normalization" in loss else []
    return "-".join([*words, f"seed{seed}"])


def _data(folder: Path, content: object) -> Data:
    names = ("tokens", "text", "corpus-megabytes", "tokenizer", "vocab-size")
    given = _section("data", content, names)
    if sum(name in given for name in ("tokens", "text", "corpus-megabytes")) != 1:
        raise StudyError("data: expected one of tokens, text and corpus-megabytes")
    if ("tokenizer" in given) == ("vocab-size" in given):
        raise StudyError("data: expected a tokenizer, or the vocab-size of one to train")
    if "tokens" in given and "tokenizer" not in given:
        raise StudyError("data: tokens belong to a tokenizer; name its folder")
    numbers = {"corpus-megabytes": float, "vocab-size": int}
    values = {
        name.replace("-", "_"): _checked(
            f"data: {name}", value, numbers.get(name, str), positive=name in numbers
        )
        for name, value in given.items()
    }
    paths = {k: folder / v for k, v in values.items() if k in ("tokens", "text", "tokenizer")}
    return Data(**{**values, **paths})


def _scoring(content: object) -> ScoringPlan:
    given = _section("evaluate", content or {}, ("split", "max-tokens", "device"))
    split = given.get("split", "test")
    if split not in SPLITS[1:]:
        raise StudyError(f"evaluate: split must be validation or test, got {split!r}")
    limit = given.get("max-tokens")
    if limit is not None:
        _checked("evaluate: max-tokens", limit, int, positive=True)
    return ScoringPlan(split, limit, _checked("evaluate: device", given.get("device", "auto"), str))


def _tasks(base: Path, content: object) -> Tasks:
    given = _section("tasks", content, ("suites", "names", "folder", "limit"))
    words = {
        part: tuple(_checked(f"tasks: {part}", v, str) for v in _listed(given.get(part, [])))
        for part in ("suites", "names")
    }
    if not any(words.values()):
        raise StudyError("tasks: expected suites or names")
    folder = _checked("tasks: folder", given["folder"], str) if "folder" in given else None
    limit = given.get("limit")
    if "limit" in given:
        _checked("tasks: limit", limit, int, positive=True)
    return Tasks(**words, folder=None if folder is None else base / folder, limit=limit)


def _section(
    name: str, content: object, known: Collection[str], required: Collection[str] = ()
) -> dict[str, Any]:
    """Return a mapping, checked to have known keys only, and all required ones."""
    if not isinstance(content, dict):
        raise StudyError(f"{name}: expected `key: value` lines, got {content!r}")
    unknown = [str(key) for key in content if key not in known]
    if unknown:
        raise StudyError(f"{name} has no key {', '.join(unknown)}; it has {', '.join(known)}")
    missing = [key for key in required if key not in content]
    if missing:
        raise StudyError(f"{name} does not say {', '.join(missing)}")
    return content


def _checked(name: str, value: object, kind: type, *, positive: bool = False) -> Any:
    """Return a value of this type; an int where a float is wanted is made one."""
    number = float(value) if kind is float and type(value) is int else value
    is_one = isinstance(number, kind) and not isinstance(number, bool)
    if not is_one or (positive and not 0 < number < inf):  # type: ignore[operator]
        wanted = f"{_WORDS[kind]} above 0" if is_one else _WORDS[kind]
        raise StudyError(f"{name}: expected {wanted}, got {value!r}")
    return number


def _listed(value: object) -> list[Any]:
    return value if isinstance(value, list) else [value]
