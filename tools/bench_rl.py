"""Log-probability and entropy beside the published functions of verl, slime, SkyRL and TRL.

    python tools/bench_rl.py [--tokens 512] [--vocabulary 32000] [--repeats 7] [--output FILE.csv]

One run, on a CPU, at one and two tensor-parallel ranks over gloo, one thread a rank. Each stack is
called as it calls itself, by its own functions and by ours in their place, in turn: forward and
backward of a sum over log-probabilities and entropies, by the logits. Times are the slowest rank's.
Errors are the largest, against float64. What is not in .venv/side (tests/rl/peers.py) is left out.
"""

import argparse
import os
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist

ROOT = Path(__file__).parent.parent
sys.path += [str(ROOT / "tests"), str(ROOT / "tests" / "rl")]
import calls  # noqa: E402
import peers  # noqa: E402
import ranks  # noqa: E402
from oracle import dense_statistics  # noqa: E402

from megatron_infoentropy.bench.losses import CountCollectives  # noqa: E402
from megatron_infoentropy.bench.results import provenance, write_csv  # noqa: E402
from megatron_infoentropy.bench.timing import Clock, peak_mib, time_in_turn  # noqa: E402

TIMED = ("verl engine", "slime", "skyrl", "trl")
KINDS = (("normal", "float32"), ("+200", "float32"), ("+200", "bfloat16"), ("-inf", "float32"))
Tensors = tuple[torch.Tensor, ...]


@dataclass
class RlRow:
    """A stack's way at one shape, by its own functions or by ours."""

    stack: str
    by: str  # "published" or "ours"
    stack_version: str
    tensor_parallel: int
    tokens: int
    vocabulary: int
    dtype: str
    logits: str  # "normal" with standard deviation 3, these "+200", half of them "-inf"
    logprob_error: float  # nats
    entropy_error: float
    gradient_error: float
    median_ms: float | None = None  # the rest of "normal" fp32 logits only
    fastest_ms: float | None = None
    repeats: int | None = None
    peak_mib: float | None = None  # beside the logits, one rank's
    logits_mib: float | None = None
    collectives: int | None = None
    collective_bytes: int | None = None  # a token, of one rank


def inputs(kind: str, dtype: str, tokens: int, vocabulary: int) -> Tensors:
    """(whole logits [1, N, V], target [1, N], gradients by log-probability and by entropy)."""
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(1, tokens, vocabulary, generator=generator)
    target = torch.randint(vocabulary, (1, tokens), generator=generator)
    if kind == "+200":
        logits += 200
    if kind == "-inf":
        hidden = torch.rand(logits.shape, generator=generator) < 0.5
        logits.masked_fill_(hidden.scatter(-1, target.unsqueeze(-1), False), -torch.inf)
    ups = torch.randn(2, 1, tokens, generator=generator)
    return logits.to(getattr(torch, dtype)), target, ups[0], ups[1]


def one_pass(call: str, functions: dict[str, Any], logits: torch.Tensor, rest: Tensors) -> Tensors:
    """(log-probability, entropy, gradient by the logits, a tensor that nothing else reads)."""
    target, by_logprob, by_entropy = rest
    logprob, entropy = calls.results(call, functions, logits, target)
    (gradient,) = torch.autograd.grad((by_logprob * logprob + by_entropy * entropy).sum(), logits)
    return logprob.detach(), entropy.detach(), gradient


def errors(found: Tensors, whole: torch.Tensor, rest: Tensors) -> dict[str, float]:
    """The largest errors, of all ranks; NaN where a number is not one."""
    leaf, world, rank = whole.double().requires_grad_(), dist.get_world_size(), dist.get_rank()
    target, by_logprob, by_entropy = rest
    ce, entropy, _ = dense_statistics(leaf, target)
    (gradient,) = torch.autograd.grad((by_entropy * entropy - by_logprob * ce).sum(), leaf)
    gradient = torch.where(leaf == -torch.inf, 0, gradient).chunk(world, -1)[rank]
    names = ("logprob_error", "entropy_error", "gradient_error")
    worst = torch.stack(
        [
            (value.double() - true.detach()).abs().max()
            for value, true in zip(found, (-ce, entropy, gradient), strict=True)
        ]
    )
    everyone = [torch.empty_like(worst) for _ in range(world)]
    dist.all_gather(everyone, worst)
    return dict(zip(names, torch.stack(everyone).amax(0).tolist(), strict=True))


def steps(
    call: str, functions: dict[str, Any], shard: torch.Tensor, rest: Tensors
) -> Iterator[None]:
    """The one timed step of a pass, which has a clone of the logits to overwrite."""
    leaf = shard.clone()
    yield
    one_pass(call, functions, leaf, rest)
    yield


def measure(world: int, tokens: int, vocabulary: int, repeats: int) -> list[RlRow]:
    """Every row of one world size, on a rank."""
    from megatron.core import parallel_state

    parallel_state.initialize_model_parallel(tensor_model_parallel_size=world)
    rows, shape = [], (tokens, vocabulary)
    for call in TIMED:
        stack = calls.stack_of(call)
        if not (peers.FOLDERS[stack] / stack).exists() or (stack == "trl" and world > 1):
            continue
        whose = {"published": calls.their_functions(stack), "ours": calls.our_functions()}
        for kind, dtype in KINDS:
            whole, *rest = inputs(kind, dtype, *shape)
            shard = whole.chunk(world, -1)[dist.get_rank()].contiguous().requires_grad_()
            of_kind = {}
            for by, functions in whose.items():
                found = one_pass(call, functions, shard.clone(), tuple(rest))
                of_kind[by] = RlRow(
                    *(stack, by, version_of(stack), world, *shape, dtype, kind),
                    **errors(found, whole, tuple(rest)),
                )
            rows += of_kind.values()
            if (kind, dtype) == KINDS[0]:
                add_cost(of_kind, whose, call, shard, tuple(rest), repeats)
    return rows


def add_cost(
    rows: dict[str, RlRow],
    whose: dict[str, dict[str, Any]],
    call: str,
    shard: torch.Tensor,
    rest: Tensors,
    repeats: int,
) -> None:
    """Fill in time, memory and collectives."""
    passes = {by: partial(steps, call, functions, shard, rest) for by, functions in whose.items()}
    measured = time_in_turn(passes, Clock(shard.device), repeats, dist.group.WORLD)
    for by, (times,) in measured.items():
        row = rows[by]
        row.median_ms, row.fastest_ms, row.repeats = median(times), min(times), repeats
        with CountCollectives() as counted:
            list(passes[by]())
        run = passes[by]()
        next(run)
        row.peak_mib = peak_mib(partial(next, run), shard.device)
        row.logits_mib = shard.numel() * shard.element_size() / 2**20
        row.collectives = counted.collectives
        row.collective_bytes = counted.bytes // row.tokens


def version_of(stack: str) -> str:
    try:
        return version(stack)
    except PackageNotFoundError:
        return "0.3.1"  # slime's checkout, which tells no other


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--output", type=Path, help="CSV file to write")
    chosen = parser.parse_args()
    facts = provenance() if chosen.output else {}
    ranks.TIMEOUT_S = 3600
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"  # verl compiles a product; ranks cannot fork
    shape = (chosen.tokens, chosen.vocabulary, chosen.repeats)
    rows = [row for world in (1, 2) for row in ranks.run_ranks(measure, world, world, *shape)[0]]
    for row in rows:
        sys.stdout.write(f"{ {name: value for name, value in asdict(row).items() if value} }\n")
    if chosen.output:
        write_csv([asdict(row) for row in rows], facts, chosen.output)


if __name__ == "__main__":
    main()
