"""What one rank of a job sees: versions, device, disk, data. Gathered and compared in `verdict`."""

import os
import platform
import shutil
import socket
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from megatron_infoentropy.data.tokenizer import is_tokenizer, tokenizer_digest
from megatron_infoentropy.doctor.data_files import DataFacts, Share, look

PACKAGES = ("megatron-infoentropy", "torch", "megatron-core", "transformers", "transformer-engine")


@dataclass(frozen=True)
class Place:
    """One of the job's processes."""

    rank: int
    world: int
    local_rank: int
    local_world: int

    @classmethod
    def from_environment(cls) -> "Place":
        """As torchrun says."""
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
        return cls(*(int(os.environ[name]) for name in names))


@dataclass(frozen=True)
class Facts:
    """Of one rank; sizes in bytes. `problems` are sentences about what it could not read."""

    rank: int
    host: str
    device: str
    memory: int  # that this rank may use: of its GPU, or its share of the host's
    disk: int  # free where the run will write
    versions: dict[str, str]
    data: DataFacts | None = None
    tokenizer: str = ""  # SHA-256
    clock_s: float = 0.0  # ahead of rank 0's
    problems: tuple[str, ...] = ()


def collect(
    place: Place, data: Path | None, tokenizer: Path | None, run: Path, *, local_data: bool = False
) -> Facts:
    """Look; every file of the data is opened by every rank, and read whole by one of them.

    With `local_data` it is read by one of each host.
    """
    found, sha256, problems = None, "", list[str]()
    if data is not None:
        by_host, by_job = Share(place.local_rank, place.local_world), Share(place.rank, place.world)
        found = look(data, by_host if local_data else by_job)
        problems += found.problems
    if tokenizer is not None:
        try:
            sha256 = tokenizer_digest(tokenizer)
            if found and found.tokenizer and is_tokenizer(tokenizer, found.tokenizer):
                sha256 = found.tokenizer  # the same, though an earlier version wrote another digest
        except (OSError, ValueError) as error:
            problems.append(f"the tokenizer cannot be read: {error}")
    device, memory = _device(place)
    return Facts(
        rank=place.rank,
        host=socket.gethostname(),
        device=device,
        memory=memory,
        disk=shutil.disk_usage(_existing(run)).free,
        versions=_versions(),
        data=found,
        tokenizer=sha256,
        problems=tuple(problems),
    )


def _existing(path: Path) -> Path:
    """The path, or the nearest folder above it that is there."""
    path = path.absolute()
    return next(folder for folder in (path, *path.parents) if folder.exists())


def _versions() -> dict[str, str]:
    found = {"Python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "none"
    import torch

    if torch.cuda.is_available():
        found["CUDA"] = str(torch.version.cuda)
        found["NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))  # type: ignore[no-untyped-call]
    return found


def _device(place: Place) -> tuple[str, int]:
    """(name, bytes of memory that are free for this rank)"""
    import torch

    if torch.cuda.is_available():
        free, _ = torch.cuda.mem_get_info(place.local_rank)
        return torch.cuda.get_device_name(place.local_rank), free
    lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
    available = next(line for line in lines if line.startswith("MemAvailable"))
    return f"CPU, {os.cpu_count()} cores", int(available.split()[1]) * 1024 // place.local_world
