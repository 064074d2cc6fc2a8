"""`infoentropy bench`: measures, gives ratios, writes the CSV that the README's table is from."""

import csv
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_infoentropy.bench.collectives import measure_collectives
from megatron_infoentropy.bench.measure import Measurement, measure
from megatron_infoentropy.bench.provenance import provenance
from megatron_infoentropy.bench.providers import OURS, available
from megatron_infoentropy.runtime.device import find_device


@dataclass(frozen=True)
class BenchResult:
    """All providers at one shape, ours first, and the time to join shards."""

    tokens: int
    vocabulary: int
    dtype: str
    threads: int
    measurements: list[Measurement]
    collectives_ms: dict[str, float]  # at `ranks` ranks
    ranks: int

    def ratios(self, measurement: Measurement) -> dict[str, float]:
        """How many times the time of each way of ours, by its name."""
        ours = {m.provider: m for m in self.measurements if m.provider in OURS}
        return {name: measurement.median_ms / m.median_ms for name, m in ours.items()}


def bench(
    *, tokens: int = 2048, vocabulary: int = 32000, dtype: str = "float32", repeats: int = 5
) -> BenchResult:
    """Forward and backward of the loss and its peers on random logits [tokens, vocabulary].

    Raises:
        ValueError: an unknown dtype.
    """
    if dtype not in ("float32", "bfloat16"):
        raise ValueError(f"dtype must be float32 or bfloat16, got {dtype!r}")
    device = torch.device(find_device().type)
    generator = torch.Generator(device).manual_seed(0)
    logits = torch.randn(tokens, vocabulary, device=device, generator=generator) * 3
    logits = logits.to(getattr(torch, dtype))
    target = torch.randint(vocabulary, (tokens,), device=device, generator=generator)
    with _group_of_one():
        providers = available(device, logits.dtype)
        measurements = measure(providers, logits, target, repeats=repeats)
    ranks = 2
    enough = device.type == "cpu" or find_device().count >= ranks
    collectives = measure_collectives(ranks, tokens, repeats=20) if enough else {}
    threads = torch.get_num_threads()
    return BenchResult(tokens, vocabulary, dtype, threads, measurements, collectives, ranks)


def write_csv(results: list[BenchResult], path: Path) -> None:
    """Append-free, complete: device, versions, commit and date stand in every row.

    Raises:
        ValueError: the commit is unknown, or the tree has changes that no commit names.
    """
    facts = provenance()
    rows = [row for result in results for row in _rows(result)]
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*rows[0], *facts], lineterminator="\n")
        writer.writeheader()
        writer.writerows(row | facts for row in rows)


def _rows(result: BenchResult) -> Iterator[dict[str, str]]:
    """One a provider, and one for each way to join shards, which has a time only."""
    shape = {
        "tokens": str(result.tokens),
        "vocabulary": str(result.vocabulary),
        "dtype": result.dtype,
        "threads": str(result.threads),
    }
    for m in result.measurements:
        yield {
            **shape,
            "provider": m.provider,
            "median_ms": f"{m.median_ms:.3f}",
            "p20_ms": f"{m.p20_ms:.3f}",
            "p80_ms": f"{m.p80_ms:.3f}",
            "peak_mib": f"{m.peak_mib:.1f}",
            **{f"times_{name}": f"{ratio:.2f}" for name, ratio in result.ratios(m).items()},
        }
    for name, milliseconds in result.collectives_ms.items():
        yield {
            **shape,
            "provider": f"join shards by {name}, {result.ranks} ranks",
            "median_ms": f"{milliseconds:.3f}",
        }


@contextmanager
def _group_of_one() -> Iterator[None]:
    """Megatron's cross entropy wants a process group even for one rank."""
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group(
            find_device().backend, init_method=f"file://{folder}/store", rank=0, world_size=1
        )
        try:
            yield
        finally:
            dist.destroy_process_group()
