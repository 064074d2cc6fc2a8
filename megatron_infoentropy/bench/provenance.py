"""Where and with what a result was obtained; no result file is written without it."""

import datetime
import os
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path

import torch

from megatron_infoentropy.runtime.device import find_device


def provenance() -> dict[str, str]:
    """Device, versions, commit and date, for every row of a result file.

    Raises:
        ValueError: the commit is unknown, or the tree has changes that no commit names.
    """
    return {
        "device": device_name(),
        "torch": version("torch"),
        "megatron_core": version("megatron-core"),
        "commit": commit_of_this_tree(),
        "date": datetime.date.today().isoformat(),
    }


def device_name() -> str:
    """The GPU's name, or the processor's and its number of cores."""
    if find_device().type == "cuda":
        return str(torch.cuda.get_device_name())
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return f"{line.partition(': ')[2]}, {os.cpu_count()} cores"
    return f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores"


def commit_of_this_tree() -> str:
    """The short commit that tracked files are at.

    Raises:
        ValueError: not a git tree, or files differ from the commit.
    """

    def git(*words: str) -> str:
        done = subprocess.run(
            ["git", *words],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=False,
        )
        return done.stdout.strip()

    commit, changed = git("rev-parse", "--short", "HEAD"), git("status", "--porcelain", "-uno")
    if not commit or changed:
        raise ValueError(
            "results are written only with the commit they belong to: run from a clone without "
            "uncommitted changes, or leave out --output"
        )
    return commit
