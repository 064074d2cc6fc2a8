"""`infoentropy bench`: all cases of a grid, on one rank or several, as rows of a result file."""

import gc
import pickle
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn

from megatron_infoentropy import InfoEntropyConfig
from megatron_infoentropy.bench import results
from megatron_infoentropy.bench.cases import Case
from megatron_infoentropy.bench.losses import measure_kernels, measure_linear, measure_losses
from megatron_infoentropy.bench.providers import Setting, failure
from megatron_infoentropy.bench.results import Row
from megatron_infoentropy.bench.timing import prepare
from megatron_infoentropy.runtime.device import Device, find_device

TIMEOUT = timedelta(minutes=5)  # a rank that waits longer for another fails instead of hanging


def bench(
    cases: list[Case],
    *,
    repeats: int,
    compiled: bool = True,
    hidden: int | None = None,
    output: Path | None = None,
    resume: bool = False,
) -> list[Row]:
    """Measure every case, where `compiled` with what torch.compile makes of the peers; with
    `hidden` also, at the first one's shape, the output layer of that size, fused and unfused. Write
    the rows to `output`, a file or a folder to name it in, where that is given, anew after every
    case; with `resume` what it has already of this device and commit is kept and not measured.

    Raises:
        ValueError: results would be written without the commit they belong to.
    """
    facts = results.provenance() if output else {}  # refuses before the work, not after it
    output = output and results.file_to_write(output, facts)
    rows = _measured_before(output, facts) if output and resume else []
    device = find_device()
    for case in cases:
        if case not in {row.case for row in rows if row.kind != "linear"}:
            measure = partial(_measure, case, compiled, device, repeats)
            rows += _measured(case, "every provider", measure)
        layer = f"output layer, hidden size {hidden}, and loss"
        is_measured = any(layer in (row.computes, row.provider) for row in rows)
        if hidden and not is_measured:
            measure = partial(_measure_linear, case, hidden, layer, device, repeats)
            rows += _measured(case, layer, measure)
        if output:
            results.write_csv([asdict(row) for row in rows], facts, output)
    return rows


def _measured_before(path: Path, facts: dict[str, str]) -> list[Row]:
    """Rows that a run of the same commit on the same device left in the file."""
    if not path.exists():
        return []
    rows, before = results.read_csv(path)
    if any(before.get(fact) != facts[fact] for fact in ("device", "commit")):
        return []
    return rows


def _measured(case: Case, what: str, measure: Callable[[], list[Row]]) -> list[Row]:
    """Its rows, or one with the reason where it fails: hours of others do not go with it."""
    try:
        return measure()
    except Exception as error:  # out of memory, say, or whatever a trainer fails with
        return [_left_out(case, what, failure(error))]
    finally:
        gc.collect()
        torch.cuda.empty_cache()  # for what follows in another process


def _measure_linear(case: Case, hidden: int, layer: str, device: Device, repeats: int) -> list[Row]:
    whole = replace(case, tensor_parallel=1)  # what is measured, and what its rows say
    chunk_tokens = max(1, min(InfoEntropyConfig().chunk_tokens, case.tokens // 2))
    place = torch.device(device.type)
    return measure_linear(whole, hidden, chunk_tokens, place, repeats=repeats, computes=layer)


def _measure(case: Case, compiled: bool, device: Device, repeats: int) -> list[Row]:
    if device.type == "cuda" and case.tensor_parallel > device.count:
        reason = f"it needs {case.tensor_parallel} GPUs, found {device.count}"
        return [_left_out(case, "every provider", reason)]
    with tempfile.TemporaryDirectory() as folder:
        if case.tensor_parallel == 1:
            return _on_rank(0, case, compiled, device, repeats, torch.get_num_threads(), folder)
        threads = max(1, torch.get_num_threads() // case.tensor_parallel)
        arguments = (case, compiled, device, repeats, threads, folder)
        spawn(_on_rank, arguments, nprocs=case.tensor_parallel)  # type: ignore[no-untyped-call]
        rows: list[Row] = pickle.loads((Path(folder) / "rows").read_bytes())
        return rows


def _on_rank(
    rank: int, case: Case, compiled: bool, device: Device, repeats: int, threads: int, folder: str
) -> list[Row]:
    """The case's rows; rank 0 of several also leaves them in the folder."""
    torch.set_num_threads(threads)
    place = torch.device(device.type, rank) if device.type == "cuda" else torch.device("cpu")
    with _group(rank, case, device, folder) as group:
        setting = Setting(case, place, group, compiled)
        if compiled:
            torch._dynamo.reset()  # compile for this very shape
        experiment = prepare(setting, repeats=repeats)
        rows = measure_losses(experiment)
        if case.tensor_parallel == 1:
            rows += measure_kernels(experiment)
        elif rank == 0:
            (Path(folder) / "rows").write_bytes(pickle.dumps(rows))
    return rows


@contextmanager
def _group(rank: int, case: Case, device: Device, folder: str) -> Iterator[dist.ProcessGroup]:
    """A group of the case's ranks; Megatron's cross entropy wants one even for one rank."""
    if device.type == "cuda":
        torch.cuda.set_device(rank)
    dist.init_process_group(
        device.backend,
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=case.tensor_parallel,
        timeout=TIMEOUT,
    )
    try:
        assert dist.group.WORLD is not None
        yield dist.group.WORLD
    finally:
        dist.destroy_process_group()


def _left_out(case: Case, what: str, reason: str) -> Row:
    nothing = {"threads": 0, "clock": "", "by": "", "computes": "", "step": ""}
    return results.row_of_case(case, kind="unavailable", provider=what, reason=reason, **nothing)
