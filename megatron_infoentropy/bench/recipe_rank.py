"""On every rank: Megatron's trainer, its steps shared out among losses and measured.

`torchrun -m megatron_infoentropy.bench.recipe_rank FOLDER ROUNDS LOSSES FLAGS` leaves rank-N.json
in the folder, written anew after every round: `RankResult`. LOSSES are names with commas between
them, or nothing for all. FLAGS are those of `megatron_infoentropy.pretrain`.
"""

import json
import os
import sys
from dataclasses import asdict
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch

from megatron_infoentropy.bench.clock import EventClock, WallClock, meter_for
from megatron_infoentropy.bench.recipe_rows import RankResult
from megatron_infoentropy.runtime import cpu, orphans
from megatron_infoentropy.runtime.device import find_device

MATRIX = {"cuda": 8192, "cpu": 1024}  # rows and columns of the matrix product to compare with
MATRIX_TURNS = 10


def main() -> None:
    """Train for as many steps as are to be measured, and one in which the results are written."""
    folder, rounds, names = Path(sys.argv.pop(1)), int(sys.argv.pop(1)), sys.argv.pop(1)
    orphans.leave_none()
    cpu.install()  # before megatron is imported; does nothing where there is a GPU

    from megatron_infoentropy.integration.compat import prepare_megatron

    prepare_megatron()
    measure(folder, rounds, names.split(",") if names else [])


def measure(folder: Path, rounds: int, names: list[str]) -> None:
    """`main` where Megatron may be imported already; the command line is the training's."""
    from megatron.training import get_args

    from megatron_infoentropy.bench.recipe_losses import TurnTakingStep, choose, contenders, turns
    from megatron_infoentropy.pretrain import prepare, run

    container, ours = prepare()
    transformer = container.model.transformer
    found, left_out = choose(names, *contenders(ours, transformer.finalize_model_grads_func))
    planned = turns(found, rounds)
    _shorten(get_args(), len(planned) + 1)

    def write(measured: dict[str, Any]) -> None:
        rows = [
            {
                "name": contender.name,
                "by": contender.by,
                "calls_output_layer": contender.calls_output_layer,
                **asdict(measured[contender.name]),
            }
            for contender in found
        ]
        result = RankResult(
            rows, [(each.name, each.reason) for each in left_out], _facts(get_args())
        )
        path = folder / f"rank-{os.environ.get('RANK', '0')}.json"
        path.with_suffix(".part").write_text(json.dumps(asdict(result)), encoding="utf-8")
        path.with_suffix(".part").replace(path)

    device = torch.device(find_device().type)
    clock = EventClock() if device.type == "cuda" else WallClock()
    step = TurnTakingStep(
        planned, clock, meter_for(device), lambda: int(get_args().curr_iteration), write
    )
    transformer.finalize_model_grads_func = step.finalize_model_grads
    run(container, step)


def _shorten(args: Any, steps: int) -> None:
    """The learning rate stays that of the recipe's first steps."""
    if args.train_iters is None:
        raise ValueError("bench-recipe needs a recipe with train-iters, not train-samples")
    args.lr_decay_iters = args.lr_decay_iters or args.train_iters
    args.train_iters = steps


def _facts(args: Any) -> dict[str, Any]:
    from megatron.training.training import num_floating_point_operations

    from megatron_infoentropy.integration.observe import peak_tflops

    layout = (
        f"tensor {args.tensor_model_parallel_size}",
        f"pipeline {args.pipeline_model_parallel_size}",
        f"data {args.data_parallel_size}",
    )
    return {
        "layers": args.num_layers,
        "hidden_size": args.hidden_size,
        "vocabulary": args.padded_vocab_size,
        "precision": _precision(args),
        "layout": " x ".join(layout),
        "ranks": args.world_size,
        "tokens": args.global_batch_size * args.seq_length,
        "micro_batch_tokens": args.micro_batch_size * args.seq_length,
        "flops_per_token": num_floating_point_operations(args, 1) / args.seq_length,
        "peak_tflops": peak_tflops(),
        "matmul_tflops": _matmul_tflops(args.params_dtype),
        "held_gib": _held_gib(),
    }


def _precision(args: Any) -> str:
    name = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
    words: str = name[args.params_dtype]
    return f"FP8 {args.fp8} {args.fp8_recipe}, else {words}" if args.fp8 else words


def _held_gib() -> float | None:
    """The most that PyTorch's allocator took of a GPU, what it caches included."""
    if find_device().type != "cuda":
        return None
    return torch.cuda.max_memory_reserved() / 2**30


@cache
def _matmul_tflops(dtype: torch.dtype) -> float:
    """What this device's matrix product reaches, in the same run: the best of some."""
    device = torch.device(find_device().type)
    size = MATRIX[device.type]
    generator = torch.Generator(device).manual_seed(0)
    draw = partial(torch.randn, size, size, device=device, generator=generator)
    left, right = draw().to(dtype), draw().to(dtype)
    clock = EventClock() if device.type == "cuda" else WallClock()
    clock.start()
    for _ in range(MATRIX_TURNS):
        torch.matmul(left, right)
        clock.mark()
    return 2 * size**3 / min(clock.read()) / 1e9


if __name__ == "__main__":
    main()
