"""Where and with what a result was obtained; no result file is written without it."""

import datetime
import os
import platform
import re
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

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


def provenance() -> dict[str, str]:
    """Device, versions, commit and date, for every row of a result file.

    Raises:
        ValueError: the commit is unknown, or the tree has changes that no commit names.
    """
    versions = {package.replace("-", "_"): _version(package) for package in PACKAGES}
    return {
        "device": device_name(),
        **versions,
        "commit": commit_of_this_tree(),
        "date": datetime.date.today().isoformat(),
    }


def file_name(facts: dict[str, str], what: str = "bench") -> str:
    """<what>_<device>_<yyyymm>.csv: "cpu", or the GPU's model."""
    words = re.findall(r"[a-z0-9]+", facts["device"].lower())
    model = next((word for word in words if re.search(r"\d", word)), "gpu")  # "NVIDIA H200"
    name = model if find_device().type == "cuda" else "cpu"
    return f"{what}_{name}_{facts['date'].replace('-', '')[:6]}.csv"


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

    Raises:
        ValueError: neither a git tree nor a named commit, or files differ from the commit.
    """
    named = os.environ.get("INFOENTROPY_COMMIT")
    if named:
        if not re.fullmatch(r"[0-9a-f]{7,40}", named):
            raise ValueError(f"INFOENTROPY_COMMIT must be 7 to 40 hex digits, got {named!r}")
        return named[:7]

    def git(*words: str) -> str:
        try:
            done = subprocess.run(
                ["git", *words],
                cwd=Path(__file__).parent,
                capture_output=True,
                text=True,
                check=False,
                errors="replace",
            )
        except FileNotFoundError:  # no git on this machine
            return ""
        return done.stdout.strip()

    commit, changed = git("rev-parse", "--short", "HEAD"), git("status", "--porcelain", "-uno")
    if not commit or changed:
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
