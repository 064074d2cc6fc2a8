"""Result files: one row a provider and pass, each with where and with what it was measured."""

import csv
import dataclasses
import datetime
import os
import platform
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal, get_type_hints

import torch

from megatron_infoentropy.bench.cases import Case
from megatron_infoentropy.files import commit_of, write_atomically
from megatron_infoentropy.runtime.device import find_device

# Those that are not installed leave their column empty.
PACKAGES = (
    "torch",
    "triton",
    "megatron-core",
    "transformer-engine",
    "liger-kernel",
    "flash-attn",
    "quack-kernels",
    "trl",
)
FACTS = ("device", *(package.replace("-", "_") for package in PACKAGES), "commit", "date")


def provenance() -> dict[str, str]:
    """Device, versions, commit and date, for every row of a result file."""
    versions = {package.replace("-", "_"): _version(package) for package in PACKAGES}
    return {
        "device": device_name(),
        **versions,
        "commit": commit_of_this_tree(),
        "date": datetime.date.today().isoformat(),
    }


def file_to_write(output: Path, facts: dict[str, str], what: str = "bench") -> Path:
    """Return `output` or, where that is a folder, <what>_<device>_<yyyymm>.csv in it.

    The device is "cpu", or the GPU's model.
    """
    if not output.is_dir():
        return output
    words = re.findall(r"[a-z0-9]+", facts["device"].lower())
    model = next((word for word in words if re.search(r"\d", word)), "gpu")  # "NVIDIA H200"
    device = model if find_device().type == "cuda" else "cpu"
    return output / f"{what}_{device}_{facts['date'].replace('-', '')[:6]}.csv"


def device_name() -> str:
    """The GPU's name, or the processor's and its number of cores."""
    if find_device().type == "cuda":
        return str(torch.cuda.get_device_name())
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return f"{line.partition(': ')[2]}, {os.cpu_count()} cores"
    return f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores"


def commit_of_this_tree() -> str:
    """The short commit that tracked files are at; INFOENTROPY_COMMIT names it where the files were
    copied without their git folder.
    """
    named = os.environ.get("INFOENTROPY_COMMIT")
    if named:
        if not re.fullmatch(r"[0-9a-f]{7,40}", named):
            raise ValueError(f"INFOENTROPY_COMMIT must be 7 to 40 hex digits, got {named!r}")
        return named[:7]

    commit = commit_of(Path(__file__).parents[2])
    if not commit or commit.endswith("-dirty"):
        raise ValueError(
            "results are written only with the commit they belong to: run from a clone without "
            "uncommitted changes (or, where there is no git, set INFOENTROPY_COMMIT), or leave out "
            "--output"
        )
    return commit


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


Kind = Literal["loss", "linear", "kernel", "limit", "unavailable"]


@dataclass(frozen=True)
class Row:
    """One line of a result file; what does not apply is None, and empty in the file."""

    kind: Kind
    tokens: int
    vocabulary: int
    dtype: str
    tensor_parallel: int
    threads: int
    clock: str
    provider: str
    by: str  # "ours" or whose
    computes: str
    step: str  # forward, backward, both; of a kernel its name
    repeats: int | None = None
    median_ms: float | None = None
    p20_ms: float | None = None
    p80_ms: float | None = None
    times_in_place: float | None = None  # median over that of the best of ours over the logits
    times_in_place_p20: float | None = None
    times_in_place_p80: float | None = None
    bytes: int | None = None  # of logits and gradient that the problem must move
    gb_per_s: float | None = None
    limit: str = ""  # what bounds a kernel here, measured in the same run
    percent_of_limit: float | None = None
    peak_mib: float | None = None  # beside the logits; of an output layer, beside its inputs
    collectives: int | None = None
    collective_bytes: int | None = None  # that one rank contributes
    loss_error: float | None = None  # against float64, nats
    gradient_error: float | None = None  # against float64, relative to the largest entry
    reason: str = ""  # why there is no time

    @property
    def case(self) -> Case:
        """The shape it belongs to; rows of one case compare equal here."""
        shape = (self.tokens, self.vocabulary, self.dtype, self.tensor_parallel)
        return Case(*shape)  # type: ignore[arg-type]


NUMBERS = {  # column -> what its text is a number of
    name: float if hint in (float, float | None) else int
    for name, hint in get_type_hints(Row).items()
    if hint in (int, float, int | None, float | None)
}


def row_of_case(case: Case, **fields: Any) -> Row:
    """Return a row with the case's columns filled in."""
    return Row(**dataclasses.asdict(case), **fields)


def write_csv(rows: Sequence[Mapping[str, object]], facts: dict[str, str], path: Path) -> None:
    """Replace `path` by these rows, all of the same columns, the facts in every one of them."""
    for fact in ("device", "torch", "megatron_core", "commit", "date"):
        if not facts.get(fact):
            raise ValueError(f"a result file needs the {fact} it belongs to; got none")
    with write_atomically(path) as new, new.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [*rows[0], *facts], lineterminator="\n")
        writer.writeheader()
        for row in rows:
            shown = {n: f"{v:.6g}" if isinstance(v, float) else v for n, v in row.items()}
            writer.writerow(shown | facts)


def read_csv(path: Path) -> tuple[list[Row], dict[str, str]]:
    """(rows, facts) of a result file, also of an older one: columns that it lacks are empty, and
    training steps, which are no longer measured, are left out.
    """
    fields = dataclasses.fields(Row)
    needed = {field.name for field in fields if field.default is dataclasses.MISSING}
    with path.open(newline="", encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    if not lines or not needed <= set(lines[0]):
        raise ValueError(f"{path} is not a result file of `infoentropy bench`; write it anew")
    names = [field.name for field in fields if field.name in lines[0]]
    rows = [
        Row(**{name: _value(line[name], NUMBERS.get(name)) for name in names})
        for line in lines
        if line["step"] != "training step"
    ]
    return rows, {fact: lines[0][fact] for fact in FACTS if fact in lines[0]}


def _value(text: str, number: type[int] | type[float] | None) -> Any:
    if number is None:
        return text
    return number(text) if text else None
