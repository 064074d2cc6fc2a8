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

`words` are a command line, read as Megatron's parser will: the last word on a flag counts.
"""

import os
import reprlib
from dataclasses import asdict, dataclass, fields
from importlib.util import find_spec
from itertools import zip_longest
from math import prod
from pathlib import Path
from typing import Any

import yaml

from megatron_infoentropy.config import MEANS, InfoEntropyConfig
from megatron_infoentropy.evaluate.runs import FIRST_FIELDS
from megatron_infoentropy.launch.limits import require_possible
from megatron_infoentropy.runtime.device import CPU_ENVIRONMENT, Device

PREFIX = "infoentropy"
LAUNCH = "launch"
MERGE = "tag:yaml.org,2002:merge"


class RecipeError(ValueError):
    """A recipe that cannot be turned into flags; says where and what to do."""


@dataclass(frozen=True)
class LaunchSection:
    """A recipe's `launch` section."""

    ranks: int | None = None
    data_weights: str = "natural"


def read_yaml(path: Path) -> Any:
    """Return what a file holds; a key that is given twice is an error.

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
    """Return {flag name: value} of a recipe file, in order, without its `launch` section.

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


def load_plan(path: Path) -> LaunchSection:
    """Return what a recipe's `launch` section says, or would if it had one.

    Raises:
        RecipeError: no recipe, or keys other than `ranks`, 1 or more, and `data-weights`, a word.
    """
    where, entries = f"{path}: {LAUNCH}", _sections(path).get(LAUNCH, {})
    kinds: dict[str, type] = {"ranks": int, "data-weights": str}
    for name, value in entries.items():
        if name not in kinds:
            raise RecipeError(
                f"{where} has no setting {name!r}, only {' and '.join(kinds)}; Megatron's flags "
                "belong to another section"
            )
        if not isinstance(value, kinds[name]) or isinstance(value, bool):
            kind = kinds[name].__name__
            raise RecipeError(f"{where}: {name} must be of type {kind}, got {reprlib.repr(value)}")
    if entries.get("ranks", 1) < 1:
        raise RecipeError(f"{where}: ranks must be at least 1, got {entries['ranks']}")
    return LaunchSection(**{name.replace("-", "_"): value for name, value in entries.items()})


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
    """Return ["--num-layers", "4", "--swiglu", ...]; False and None leave a flag out."""
    words: list[str] = []
    for name, value in flags.items():
        if value is not None and value is not False:
            values = value if isinstance(value, list) else [] if value is True else [value]
            words += [f"--{name}", *map(str, values)]
    return words


def loss_flags(settings: dict[str, Any]) -> dict[str, Any]:
    """Return fields of InfoEntropyConfig as flags; a false switch becomes its --no- form."""
    flags: dict[str, Any] = {}
    for name, value in settings.items():
        flag = f"{PREFIX}-{name.replace('_', '-')}"
        flags[f"no-{flag}" if value is False else flag] = True if value is False else value
    return flags


DEFAULTS: dict[str, Any] = {
    **loss_flags({field.name: field.default for field in fields(InfoEntropyConfig)}),
    "seed": 1234,
    "tensor-model-parallel-size": 1,
    "pipeline-model-parallel-size": 1,
}


def chosen_flags(device: Device, recipe: dict[str, Any], settings: dict[str, Any]) -> list[str]:
    """Return all flags but those that say where things are."""
    return [*machine_flags(device, recipe), *written_flags(recipe, settings)]


def written_flags(recipe: dict[str, Any], settings: dict[str, Any]) -> list[str]:
    """Return the flags that do not depend on the machine."""
    return [word for flags in (DEFAULTS, recipe, settings) for word in to_command_line(flags)]


# With a GPU but without Transformer Engine, Megatron has PyTorch's layers to fall back on.
PLAIN_GPU_FLAGS = (
    "--transformer-impl=local",
    "--no-persist-layer-norm",
    "--no-rope-fusion",
    "--no-masked-softmax-fusion",
)
# Without this kernel of Apex, Megatron's output layer raises, whoever makes the other layers.
FUSION_KERNEL = "fused_weight_gradient_mlp_cuda"
NO_FUSION_FLAG = "--no-gradient-accumulation-fusion"


def machine_flags(device: Device, recipe: dict[str, Any]) -> list[str]:
    """Return this machine's flags, to be put before a recipe, whose own ones come later and win."""
    if device.type == "cpu":
        from megatron_infoentropy.runtime.cpu import CPU_FLAGS  # takes torch's seconds to import

        return list(CPU_FLAGS)
    has_layers = "transformer-impl" in recipe or find_spec("transformer_engine") is not None
    flags = [] if has_layers else list(PLAIN_GPU_FLAGS)
    return flags if find_spec(FUSION_KERNEL) else [*flags, NO_FUSION_FLAG]


def machine_environment(device: Device, ranks: int) -> dict[str, str]:
    """Return environment variables for the ranks; those already set stay as they are."""
    wanted = {
        "CUDA_DEVICE_MAX_CONNECTIONS": "1",  # tensor parallelism relies on the order of launches
        "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // ranks)),
        "PYTHONUNBUFFERED": "1",
    }
    if device.type == "cpu":
        wanted |= CPU_ENVIRONMENT
    return {name: os.environ.get(name, value) for name, value in wanted.items()}


def read_facts(words: list[str]) -> dict[str, Any]:
    """Return the objective, seed, layout and sizes that a command line amounts to.

    Every command that starts or counts a training comes by here before it does.

    Raises:
        ValueError: an objective, or a number, that no training can start with.
    """
    given = given_flags(words)
    require_possible(given)
    objective = read_loss(words)
    objective.require_export(given)
    loss = {n: v for n, v in asdict(objective).items() if n not in MEANS}
    numbers = {
        "seed": "seed",
        "tensor_parallel": "tensor-model-parallel-size",
        "pipeline_parallel": "pipeline-model-parallel-size",
        "context_parallel": "context-parallel-size",
        "train_iters": "train-iters",
        "global_batch_size": "global-batch-size",
        "micro_batch_size": "micro-batch-size",
        "seq_length": "seq-length",
    }
    facts = {name: int(given[flag]) if flag in given else None for name, flag in numbers.items()}
    facts["context_parallel"] = facts["context_parallel"] or 1
    return {**{name: loss[name] for name in FIRST_FIELDS}, "loss": loss, **facts}


def read_loss(words: list[str]) -> InfoEntropyConfig:
    """Return the loss that a command line amounts to.

    Raises:
        ValueError: as InfoEntropyConfig does.
    """
    given, settings = given_flags(words), dict[str, Any]()
    for field in fields(InfoEntropyConfig):
        flag = f"{PREFIX}-{field.name.replace('_', '-')}"
        switches = [word for word in words if word in (f"--{flag}", f"--no-{flag}")]
        if field.type is bool and switches:
            settings[field.name] = switches[-1] == f"--{flag}"
        elif given.get(flag) and field.type is not bool:
            settings[field.name] = _value(flag, given[flag], field.type)
    return InfoEntropyConfig(**settings)


def _value(flag: str, text: str, kind: Any) -> Any:
    try:
        return kind(text) if kind in (int, float) else text
    except ValueError:
        raise ValueError(f"--{flag} must be a number, got {text!r}") from None


def warnings(words: list[str]) -> list[str]:
    """Return sentences about what can be meant, and hardly ever is."""
    loss = read_loss(words)
    lowest = min(loss.gamma, loss.gamma_end)  # which is positive without a schedule
    if not loss.is_weighted or lowest >= 0:
        return []
    return [
        f"WARNING: gamma {lowest:g} is negative: tokens of high entropy weigh less, which is "
        "the opposite of the published loss"
    ]


def useful_ranks(facts: dict[str, Any], devices: int) -> int:
    """Return the most ranks that fit the devices and divide the batch; what one model needs."""
    model_ranks = ranks_of_a_model(facts)
    micro_batches = (facts["global_batch_size"] or 1) // (facts["micro_batch_size"] or 1)
    copies = [n for n in range(1, devices // model_ranks + 1) if micro_batches % n == 0]
    return model_ranks * max(copies, default=1)


def ranks_of_a_model(facts: dict[str, Any]) -> int:
    """Return how many ranks hold one copy of the model."""
    return prod(int(facts[f"{axis}_parallel"]) for axis in ("tensor", "pipeline", "context"))


def last_value(words: list[str], name: str) -> str | None:
    """Return the value of a flag, the last time it is given, in either spelling."""
    return given_flags(words).get(name) or None


def given_flags(words: list[str]) -> dict[str, str]:
    """Return {flag: its first value, "" without one}, of the last time a flag is given."""
    given: dict[str, str] = {}
    for word, following in zip_longest(words, words[1:], fillvalue="--"):
        if word.startswith("--"):
            name, has_value, value = word[2:].partition("=")
            given[name] = value if has_value or following.startswith("--") else following
    return given
