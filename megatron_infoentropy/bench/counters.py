"""Bytes that a kernel really moved to and from a GPU's memory, by hardware counters: Nsight Compute
(`ncu`) around one launch of one kernel in a process of its own."""

import csv
import shutil
import subprocess
import sys
from typing import NamedTuple

from megatron_infoentropy.bench.cases import Case
from megatron_infoentropy.bench.providers import Unavailable

READ, WRITE = "dram__bytes_read.sum", "dram__bytes_write.sum"
UNITS = {"byte": 1, "Kbyte": 10**3, "Mbyte": 10**6, "Gbyte": 10**9, "Tbyte": 10**12}
TIMEOUT_S = 60


class DramBytes(NamedTuple):
    """Of all GPU kernels that one launch consists of."""

    read: int
    write: int


def dram_bytes(backend: str, step: str, case: Case) -> DramBytes:
    """Bytes that one launch of a backend's "statistics" or "gradient" moved.

    Raises:
        Unavailable: ncu is absent, or not permitted to read the counters, or failed.
    """
    ncu = shutil.which("ncu")
    if ncu is None:
        raise Unavailable("ncu (Nsight Compute) is not installed")
    command = [
        *(ncu, "--csv", "--print-units", "base", "--metrics", f"{READ},{WRITE}"),
        *("--profile-from-start", "off"),  # only between the profiler's start and stop
        *("--clock-control", "none"),  # the device's settings stay as they are
        *(sys.executable, "-m", "megatron_infoentropy.bench.launch_once"),
        *(backend, step, str(case.tokens), str(case.columns), case.dtype),
    ]
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            check=False,
            timeout=TIMEOUT_S,
            errors="replace",
        )
    except subprocess.TimeoutExpired:
        raise Unavailable(f"ncu took more than {TIMEOUT_S} s") from None
    if done.returncode:
        raise Unavailable(_complaint(done.stdout + done.stderr))
    return parse(done.stdout)


def parse(output: str) -> DramBytes:
    """The sums over all launches in ncu's CSV, which its messages and the program's may surround.

    Raises:
        Unavailable: there is no such CSV, or it lacks the two counters.
    """
    lines = output.splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith('"ID",')), None)
    if start is None:
        raise Unavailable(_complaint(output))
    table = [line for line in lines[start:] if line.startswith('"')]
    sums = {READ: 0.0, WRITE: 0.0}
    seen = set()
    for row in csv.DictReader(table):
        name, unit, value = row["Metric Name"], row["Metric Unit"], row["Metric Value"]
        if name in sums and unit in UNITS:  # a counter that the device lacks reads "n/a"
            sums[name] += float(value.replace(",", "")) * UNITS[unit]
            seen.add(name)
    if seen != set(sums):
        raise Unavailable(f"ncu gave no {' and no '.join(sorted(set(sums) - seen))}")
    return DramBytes(round(sums[READ]), round(sums[WRITE]))


def _complaint(output: str) -> str:
    """What ncu says is wrong, in one line."""
    if "ERR_NVGPUCTRPERM" in output:
        return "ncu may not read this GPU's performance counters (ERR_NVGPUCTRPERM)"
    errors = [line for line in output.splitlines() if line.startswith("==ERROR==")]
    last = output.strip().splitlines()[-1:]
    return f"ncu failed: {' '.join(errors[:1] or last or ['it said nothing'])}"
