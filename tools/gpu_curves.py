"""Short trainings of the 6.7B recipe, narrow and two layers deep, in bf16 and in FP8:

    python tools/gpu_curves.py OUTPUT.csv [--steps 20]

All at once on one GPU, from one seed and on the same made-up text. The file has a row a step, and
is written anew while they train. Exit status 1 where a training fails or an FP8 curve leaves that
of bf16. A CPU has no FP8: there all three train in bf16, which shows that the script runs.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from megatron_infoentropy.bench.results import provenance, write_csv
from megatron_infoentropy.evaluate.runlog import Values, read_log
from megatron_infoentropy.launch.recipe import (
    load_recipe,
    machine_environment,
    machine_flags,
    to_command_line,
)
from megatron_infoentropy.runtime.device import find_device

RECIPE = Path(__file__).parents[1] / "examples" / "paper" / "6.7b.yaml"
NARROW = [
    *("--num-layers=2", "--hidden-size=256", "--ffn-hidden-size=512", "--num-attention-heads=4"),
    *("--seq-length=128", "--max-position-embeddings=128", "--vocab-size=1024"),
    *("--micro-batch-size=2", "--global-batch-size=4", "--lr-warmup-iters=1", "--lr=1e-3"),
    *("--log-interval=1", "--eval-iters=0", "--mock-data", "--tokenizer-type=NullTokenizer"),
]
FP8 = ["--transformer-impl=transformer_engine", "--fp8-format=hybrid", "--fp8-recipe"]
PRECISIONS: dict[str, list[str]] = {
    "bf16": [],
    "FP8 tensorwise": [*FP8, "tensorwise"],
    "FP8 delayed": [*FP8, "delayed", "--fp8-amax-history-len=16", "--fp8-amax-compute-algo=max"],
}
COLUMNS = ("cross entropy", "entropy", "grad norm")
LARGEST_GAP = 0.03  # of bf16's cross entropy, at any step

Curves = dict[str, dict[int, Values]]


def start(flags: list[str], steps: int, log: Path) -> "subprocess.Popen[bytes]":
    """One training, its output in the log."""
    device = find_device()
    recipe: dict[str, Any] = {
        name: value
        for name, value in load_recipe(RECIPE).items()
        if not name.startswith("fp8") and (name != "transformer-impl" or device.type == "cuda")
    }
    precision = flags if device.type == "cuda" else []
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    words = [*machine_flags(device, recipe), *to_command_line(recipe), *NARROW, *precision]
    with log.open("wb") as file:
        return subprocess.Popen(
            [*torchrun, "-m", "megatron_infoentropy.pretrain", *words, f"--train-iters={steps}"],
            env={**os.environ, **machine_environment(device, len(PRECISIONS))},
            stdout=file,
            stderr=subprocess.STDOUT,
        )


def write(path: Path, logs: dict[str, Path], facts: dict[str, str]) -> Curves:
    """What the trainings have logged so far, as the file has it now."""
    curves = {name: read_log(log).training for name, log in logs.items()}
    rows = [
        {"precision": name, "iteration": iteration} | {n: seen.get(n) for n in COLUMNS}
        for name, curve in curves.items()
        for iteration, seen in sorted(curve.items())
    ]
    if rows:
        write_csv(rows, facts, path)
    return curves


def gap(curve: dict[int, Values], other: dict[int, Values]) -> float:
    """The largest relative difference of their cross entropies, a missing or NaN one infinite."""
    far = float("inf")
    gaps = [
        abs(seen["cross entropy"] / other.get(i, {}).get("cross entropy", far) - 1)
        for i, seen in curve.items()
    ]
    return max((each if each == each else far for each in gaps), default=far)


def follow(output: Path, steps: int, folder: Path) -> bool:
    """Train in every precision; whether each did as it should. Says so, with the logs of others."""
    facts, logs = provenance(), {name: folder / f"{name}.log" for name in PRECISIONS}
    running = {name: start(PRECISIONS[name], steps, log) for name, log in logs.items()}
    while any(process.poll() is None for process in running.values()):
        time.sleep(1)
        write(output, logs, facts)
    curves = write(output, logs, facts)
    wrong = []
    for name, process in running.items():
        curve, apart = curves[name], gap(curves[name], curves["bf16"])
        if process.returncode or len(curve) != steps or not apart <= LARGEST_GAP:
            wrong.append(name)
            printed = logs[name].read_text(encoding="utf-8", errors="replace")
            sys.stdout.write(f"\n{name}:\n{printed[-3000:]}\n")
        ends = [f"{curve[i]['cross entropy']:.4f}" for i in (1, steps) if i in curve]
        said = f"{name}: status {process.returncode}, cross entropy {' to '.join(ends)}"
        sys.stdout.write(f"{said} in {len(curve)} steps, {100 * apart:.2f} % from bf16\n")
    return not wrong


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", type=Path)
    parser.add_argument("--steps", type=int, default=20)
    words = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        sys.exit(0 if follow(words.output, words.steps, Path(folder)) else 1)
