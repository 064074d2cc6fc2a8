"""What a command line says, read as Megatron's parser will: the last word on a flag counts."""

from dataclasses import asdict, fields
from itertools import zip_longest
from math import prod
from typing import Any

from megatron_infoentropy.config import MEANS, InfoEntropyConfig
from megatron_infoentropy.evaluate.runs import FIRST_FIELDS
from megatron_infoentropy.launch.limits import require_possible
from megatron_infoentropy.launch.machine import machine_flags
from megatron_infoentropy.launch.recipe import to_command_line
from megatron_infoentropy.runtime.device import Device

PREFIX = "infoentropy"


def loss_flags(settings: dict[str, Any]) -> dict[str, Any]:
    """Fields of InfoEntropyConfig as flags; a false switch becomes its --no- form."""
    flags: dict[str, Any] = {}
    for name, value in settings.items():
        flag = f"{PREFIX}-{name.replace('_', '-')}"
        flags[f"no-{flag}" if value is False else flag] = True if value is False else value
    return flags


DEFAULTS: dict[str, Any] = {
    **loss_flags(asdict(InfoEntropyConfig())),
    "seed": 1234,
    "tensor-model-parallel-size": 1,
    "pipeline-model-parallel-size": 1,
}


def chosen_flags(device: Device, recipe: dict[str, Any], settings: dict[str, Any]) -> list[str]:
    """All flags but those that say where things are."""
    return [*machine_flags(device, recipe), *written_flags(recipe, settings)]


def written_flags(recipe: dict[str, Any], settings: dict[str, Any]) -> list[str]:
    """The flags that do not depend on the machine."""
    return [word for flags in (DEFAULTS, recipe, settings) for word in to_command_line(flags)]


def read_facts(words: list[str]) -> dict[str, Any]:
    """Objective, seed, layout and sizes that a command line amounts to.

    Every command that starts or counts a training comes by here before it does.

    Raises:
        ValueError: an objective, or a number, that no training can start with.
    """
    require_possible(given_flags(words))
    loss = {n: v for n, v in asdict(read_loss(words)).items() if n not in MEANS}
    return {
        **{name: loss[name] for name in FIRST_FIELDS},
        "loss": loss,
        "seed": _number(words, "seed", int),
        "tensor_parallel": _number(words, "tensor-model-parallel-size", int),
        "pipeline_parallel": _number(words, "pipeline-model-parallel-size", int),
        "context_parallel": _number(words, "context-parallel-size", int) or 1,
        "train_iters": _number(words, "train-iters", int),
        "global_batch_size": _number(words, "global-batch-size", int),
        "micro_batch_size": _number(words, "micro-batch-size", int),
        "seq_length": _number(words, "seq-length", int),
    }


def read_loss(words: list[str]) -> InfoEntropyConfig:
    """The loss that a command line amounts to.

    Raises:
        ValueError: as InfoEntropyConfig does.
    """
    settings: dict[str, Any] = {}
    for field in fields(InfoEntropyConfig):
        flag = f"{PREFIX}-{field.name.replace('_', '-')}"
        if field.type is bool:
            settings[field.name] = _is_on(words, flag)
        elif field.type is int or field.type is float:
            settings[field.name] = _number(words, flag, field.type)
        else:
            settings[field.name] = last_value(words, flag)
    settings = {name: value for name, value in settings.items() if value is not None}
    return InfoEntropyConfig(**settings)


def warnings(words: list[str]) -> list[str]:
    """What can be meant, and hardly ever is."""
    loss = read_loss(words)
    lowest = min(loss.gamma, loss.gamma_end if loss.gamma_schedule != "constant" else loss.gamma)
    if loss.is_weighted and lowest < 0:
        return [
            f"WARNING: gamma {lowest:g} is negative: tokens of high entropy weigh less, which is "
            "the opposite of the published loss"
        ]
    return []


def useful_ranks(facts: dict[str, Any], devices: int) -> int:
    """The most ranks that fit the devices and divide the batch; at least what one model needs."""
    model_ranks = ranks_of_a_model(facts)
    micro_batches = (facts["global_batch_size"] or 1) // (facts["micro_batch_size"] or 1)
    copies = [n for n in range(1, devices // model_ranks + 1) if micro_batches % n == 0]
    return model_ranks * max(copies, default=1)


def ranks_of_a_model(facts: dict[str, Any]) -> int:
    """How many ranks hold one copy of the model."""
    return prod(int(facts[f"{axis}_parallel"]) for axis in ("tensor", "pipeline", "context"))


def last_value(words: list[str], name: str) -> str | None:
    """The value of a flag, the last time it is given, in either spelling."""
    return given_flags(words).get(name) or None


def given_flags(words: list[str]) -> dict[str, str]:
    """{flag: its first value, "" without one}; of a flag that is given twice the last counts."""
    given: dict[str, str] = {}
    for word, following in zip_longest(words, words[1:], fillvalue="--"):
        if word.startswith("--"):
            name, has_value, value = word[2:].partition("=")
            given[name] = value if has_value or following.startswith("--") else following
    return given


def _number[T: (int, float)](words: list[str], name: str, kind: type[T]) -> Any:
    value = last_value(words, name)
    try:
        return None if value is None else kind(value)
    except ValueError:
        raise ValueError(f"--{name} must be a number, got {value!r}") from None


def _is_on(words: list[str], name: str) -> bool | None:
    switches = [word for word in words if word in (f"--{name}", f"--no-{name}")]
    return switches[-1] == f"--{name}" if switches else None
