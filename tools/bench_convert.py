"""Peak memory and time of `convert` and `convert-from-hf`, on generated bf16 weights.

    python tools/bench_convert.py FOLDER RECIPE.yaml... [--stacked] [--output FILE.csv]

For every recipe (examples/paper/*.yaml) FOLDER holds three copies of its model for a while. As in
Megatron, every layer is a piece of its own; with --stacked, all layers of a parameter are one
piece, as other writers leave them. Export and import each run in a process of their own, whose peak
is all that was ever resident: Python, PyTorch, and what is mapped of the files. What the import
wrote is compared with what was generated, tensor by tensor.
"""

import argparse
import csv
import json
import math
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml

from megatron_infoentropy.checkpoints import TRACKER
from megatron_infoentropy.convert import convert_checkpoint, convert_from_hf
from megatron_infoentropy.convert.architecture import Architecture
from megatron_infoentropy.convert.checkpoint import MegatronCheckpoint
from megatron_infoentropy.convert.distcp import Part, write_distcp
from megatron_infoentropy.convert.from_hf import arguments_of, steps_to_write
from megatron_infoentropy.convert.hf_config import architecture_from_config

BLOCK = 0.02 * torch.randn(1_000_003, generator=torch.Generator().manual_seed(0)).bfloat16()
COMMANDS = {"export": convert_checkpoint, "import": convert_from_hf}


def model_of(recipe: Path) -> Architecture:
    """Return the Llama that a recipe describes."""
    from transformers import AutoConfig

    flags = yaml.safe_load(recipe.read_text(encoding="utf-8"))["model"]
    config = AutoConfig.for_model(
        "llama",
        hidden_size=flags["hidden-size"],
        intermediate_size=flags["ffn-hidden-size"],
        num_hidden_layers=flags["num-layers"],
        num_attention_heads=flags["num-attention-heads"],
        vocab_size=flags["vocab-size"],
    )
    return architecture_from_config(config)


def draw(shape: tuple[int, ...]) -> torch.Tensor:
    """Return the same random numbers over and over, which no row has in the same place."""
    repeats = -(-math.prod(shape) // len(BLOCK))
    return BLOCK.repeat(repeats)[: math.prod(shape)].view(shape)


def parts_of(model: Architecture, stacked: bool) -> Iterator[Part]:
    """Yield every parameter, whole or layer by layer, with what draws it."""
    drawn = set()
    for step in steps_to_write(model):
        place = () if stacked else step.part
        if (step.name, place) not in drawn:
            drawn.add((step.name, place))
            yield step.name, step.shape, place, partial(draw, step.shape[len(place) :])


def generate(folder: Path, model: Architecture, stacked: bool) -> None:
    iteration = folder / "iter_0000001"
    common = {"args": arguments_of(model), "iteration": 1}
    parts = parts_of(model, stacked)
    write_distcp(iteration, torch.bfloat16, parts, {"common_state/shard_0_1": common})
    (iteration / "metadata.json").write_text(
        json.dumps({"sharded_backend": "torch_dist"}), encoding="utf-8"
    )
    (folder / TRACKER).write_text("1", encoding="utf-8")


def measure(kind: str, source: Path, output: Path) -> tuple[float, float]:
    """Run one conversion in a process of its own; return its peak in GB, and seconds."""
    start = time.monotonic()
    words = [sys.executable, __file__, "--run", kind, str(source), str(output)]
    done = subprocess.run(words, check=True, stdout=subprocess.PIPE, encoding="utf-8")
    return float(done.stdout), time.monotonic() - start


def run(kind: str, source: Path, output: Path) -> None:
    """Convert, and write this process's peak to stdout."""
    COMMANDS[kind](source, output)  # type: ignore[operator]
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    sys.stdout.write(str(int(status.partition("VmHWM:")[2].split()[0]) * 1024 / 1e9))


def require_same(first: Path, second: Path) -> None:
    """Compare two checkpoints bit by bit, a layer at a time."""
    one, other = MegatronCheckpoint(first), MegatronCheckpoint(second)
    assert one.tensors.keys() == other.tensors.keys()
    for name, tensor in one.tensors.items():
        layers = range(tensor.shape[0]) if ".layers." in name else [None]
        for place in [() if layer is None else (layer,) for layer in layers]:
            assert torch.equal(one.read(name, place), other.read(name, place)), (name, place)


def rows_for(folder: Path, recipe: Path, stacked: bool) -> Iterator[dict[str, Any]]:
    model = model_of(recipe)
    save, hf, back = (folder / name for name in ("save", "hf", "back"))
    generate(save, model, stacked)
    size = sum(path.stat().st_size for path in save.rglob("*.distcp")) / 1e9
    facts = {"recipe": recipe.stem, "pieces": "stacked" if stacked else "layers"}
    for kind, source, output in (("export", save, hf), ("import", hf, back)):
        peak, seconds = measure(kind, source, output)
        numbers = {"gigabytes": size, "peak_gb": peak, "seconds": seconds}
        yield {**facts, "command": kind, **{name: f"{n:.2f}" for name, n in numbers.items()}}
    require_same(save, back)
    for place in (save, hf, back):
        shutil.rmtree(place)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("recipes", type=Path, nargs="+")
    parser.add_argument("--stacked", action="store_true")
    parser.add_argument("--output", type=Path)
    words = parser.parse_args()
    rows = [r for path in words.recipes for r in rows_for(words.folder, path, words.stacked)]
    for row in rows:
        sys.stdout.write(f"{row}\n")
    if words.output:
        from megatron_infoentropy.bench.results import provenance

        facts = provenance()
        with words.output.open("a", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, [*rows[0], *facts])
            if not file.tell():
                writer.writeheader()
            writer.writerows({**row, **facts} for row in rows)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--run"]:
        run(sys.argv[2], Path(sys.argv[3]), Path(sys.argv[4]))
    else:
        main()
