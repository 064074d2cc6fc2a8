"""What a training leaves behind beside its checkpoints: run.json, and its log.

RUN/run.json       what was run: objective, seed, sizes, command, versions
RUN/train.log      everything Megatron printed
RUN/checkpoints/   Megatron's torch_dist checkpoints
"""

import json
import os
from importlib.metadata import version
from pathlib import Path

from megatron_infoentropy.launch.flags import ranks_of_a_model, read_facts
from megatron_infoentropy.runtime.device import Device

LOG = "train.log"
VERSIONS = ("megatron-infoentropy", "megatron-core", "torch", "transformers")


def write_facts(
    run: Path, recipe: Path, words: list[str], ranks: int, device: str, parameters: int | None
) -> None:
    """Write `run.json`; `words` is the command line, `parameters` what the log said."""
    facts = read_facts(words)
    content = {
        "name": run.name,
        **facts,
        "data_parallel": ranks // ranks_of_a_model(facts),
        "device": device,
        "parameters": parameters,
        "recipe": recipe.name,
        "command": words,
        "versions": {name: version(name) for name in VERSIONS},
    }
    temporary = run / "run.json.tmp"
    temporary.write_text(json.dumps(content, indent=2) + "\n")
    temporary.rename(run / "run.json")


def device_name(device: Device) -> str:
    """For a reader: of the machine that this process runs on."""
    if device.type == "cpu":
        return f"CPU, {os.cpu_count()} cores"
    import torch

    return f"{device.count} x {torch.cuda.get_device_name()}"
