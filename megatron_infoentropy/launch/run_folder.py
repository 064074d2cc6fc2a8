"""What a training leaves behind beside its checkpoints: run.json, and its log.

RUN/run.json       what was run: objective, seed, sizes, tokenizer, command, versions
RUN/train.log      everything Megatron printed
RUN/checkpoints/   Megatron's torch_dist checkpoints
"""

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

from megatron_infoentropy.data.manifest import load_manifest
from megatron_infoentropy.files import commit_of, write_whole
from megatron_infoentropy.launch.lineage import (
    FACTS,
    lineage,
    load_facts,
    require_same_training,
    saved_step,
    take_back,
)
from megatron_infoentropy.launch.recipe import ranks_of_a_model, read_facts
from megatron_infoentropy.runtime.device import Device

LOG = "train.log"
TRAIN_DATA = "--train-data-path"
STOPPED = "exiting program after receiving SIGTERM"  # Megatron's words, whatever the signal was
PACKAGE = Path(__file__).parents[1]
VERSIONS = ("megatron-infoentropy", "megatron-core", "torch", "transformers")


def write_facts(run: Path, recipe: Path, words: list[str], ranks: int, device: str) -> None:
    """Write `run.json` of the training that the command line `words` starts or goes on with.

    The number of parameters, which only a training says, stays as it is known.
    """
    facts, stages = read_facts(words), lineage(run, words)
    content = {
        "name": run.name,
        **facts,
        **(
            {"lineage": [{"from_step": s.from_step, **s.facts} for s in stages]}
            if len(stages) > 1
            else {}
        ),
        "data_parallel": ranks // ranks_of_a_model(facts),
        "device": device,
        "parameters": load_facts(run).get("parameters"),
        "tokenizer_sha256": _tokenizer_sha256(words),
        "recipe": recipe.name,
        "command": words,
        "versions": {name: version(name) for name in VERSIONS}
        | {"commit": commit_of(PACKAGE.parent)},
    }
    run.mkdir(parents=True, exist_ok=True)
    _write(run, content)


@contextmanager
def recorded(run: Path, recipe: Path, words: list[str], ranks: int, device: str) -> Iterator[None]:
    """Meanwhile run.json says what is trained; afterwards what the newest checkpoint is.

    A training that saved no step changes nothing of a run that has a checkpoint.
    """
    before, start = load_facts(run), saved_step(run, words)
    write_facts(run, recipe, words, ranks, device)
    try:
        yield
    finally:
        with suppress(ValueError):  # a damaged checkpoint: the reason of another error, if any
            settle_facts(run)
            if before and start is not None and (saved_step(run, []) or 0) <= start:
                _write(run, {**before, "parameters": load_facts(run)["parameters"]})


def require_same(run: Path, words: list[str], *, switch: bool) -> None:
    """Check that the run folder may take this training: `lineage.require_same_training`."""
    require_same_training(run, words, _tokenizer_sha256(words), switch=switch)


def _tokenizer_sha256(words: list[str]) -> str | None:
    """Of the tokenizer that the training data were made with, if their manifest is there."""
    if TRAIN_DATA not in words:
        return None
    last = len(words) - words[::-1].index(TRAIN_DATA)  # of a flag given twice
    try:
        _, prefix = words[last:][:2]  # a blend: WEIGHT PREFIX ...
        return load_manifest(Path(prefix).parent).tokenizer.sha256
    except (OSError, ValueError):
        return None


def settle_facts(run: Path) -> None:
    """Have `run.json` say what only the training could: the model's size, and what came of it."""
    facts, parameters = load_facts(run), parameters_in(run / LOG)
    if facts:
        known = {} if parameters is None else {"parameters": parameters}
        _write(run, take_back(facts, saved_step(run, [])) | known)


def parameters_in(log: Path) -> int | None:
    """What Megatron said when it built the model."""
    if not log.is_file():
        return None
    with log.open(encoding="utf-8", errors="replace") as lines:
        return next((said for line in lines if (said := said_parameters(line)) is not None), None)


def said_parameters(line: str) -> int | None:
    """The number in a line of the log, None for another line; ranks may print on one."""
    found = re.search(r"model parameters: (\d+)", line)
    return int(found[1]) if found else None


def _write(run: Path, content: dict[str, Any]) -> None:
    write_whole(run / FACTS, json.dumps(content, indent=2) + "\n")


def device_name(device: Device) -> str:
    """For a reader: of the machine that this process runs on."""
    if device.type == "cpu":
        return f"CPU, {os.cpu_count()} cores"
    import torch

    return f"{device.count} x {torch.cuda.get_device_name()}"
