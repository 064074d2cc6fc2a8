"""What a training leaves behind beside its checkpoints: run.json, and its log.

RUN/run.json       what was run: objective, seed, sizes, tokenizer, command, versions
RUN/train.log      everything Megatron printed
RUN/checkpoints/   Megatron's torch_dist checkpoints
"""

import json
import os
from importlib.metadata import version
from pathlib import Path
from typing import Any

from megatron_infoentropy.data.manifest import load_manifest
from megatron_infoentropy.launch.flags import ranks_of_a_model, read_facts
from megatron_infoentropy.launch.revision import revision_of
from megatron_infoentropy.runtime.device import Device

FACTS, LOG = "run.json", "train.log"
TRAIN_DATA = "--train-data-path"
STOPPED = "exiting program after receiving SIGTERM"  # Megatron's words, whatever the signal was
VERSIONS = ("megatron-infoentropy", "megatron-core", "torch", "transformers")


def write_facts(
    run: Path, recipe: Path, words: list[str], ranks: int, device: str, parameters: int | None
) -> None:
    """Write `run.json`; `words` is the command line, `parameters` what the log said.

    Without `parameters` the number stays that was known before.
    """
    facts = read_facts(words)
    if parameters is None:
        parameters = _known_parameters(run)
    content = {
        "name": run.name,
        **facts,
        "data_parallel": ranks // ranks_of_a_model(facts),
        "device": device,
        "parameters": parameters,
        "tokenizer_sha256": _tokenizer_sha256(words),
        "recipe": recipe.name,
        "command": words,
        "versions": {name: version(name) for name in VERSIONS} | {"commit": revision_of()},
    }
    _write(run, content)


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


def _known_parameters(run: Path) -> int | None:
    try:
        known = json.loads((run / FACTS).read_text())["parameters"]
    except (FileNotFoundError, ValueError, KeyError):
        return None
    return int(known) if known is not None else None


def complete_facts(run: Path, parameters: int) -> None:
    """Add to `run.json` what only the training could say."""
    _write(run, json.loads((run / FACTS).read_text()) | {"parameters": parameters})


def _write(run: Path, content: dict[str, Any]) -> None:
    temporary = run / f"{FACTS}.tmp"
    temporary.write_text(json.dumps(content, indent=2) + "\n")
    temporary.rename(run / FACTS)


def device_name(device: Device) -> str:
    """For a reader: of the machine that this process runs on."""
    if device.type == "cpu":
        return f"CPU, {os.cpu_count()} cores"
    import torch

    return f"{device.count} x {torch.cuda.get_device_name()}"
