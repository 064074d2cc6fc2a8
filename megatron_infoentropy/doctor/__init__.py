"""Tell what this machine offers to training, and what to do about what is missing.

Nothing here imports what it only looks for: a package that merely has the right name must not run.
"""

import shutil
import sys
from dataclasses import dataclass
from importlib.machinery import PathFinder
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

from megatron_infoentropy.runtime.device import find_device

Verdict = Literal["ok", "optional", "missing"]


@dataclass(frozen=True)
class MachineFact:
    """One line of the report; `advice` is empty where nothing is to be done."""

    subject: str
    found: str
    verdict: Verdict = "ok"
    advice: str = ""


def examine() -> list[MachineFact]:
    """Look at everything that training depends on, most important first."""
    return [
        MachineFact("Python", sys.version.split()[0]),
        _package("torch", "needed for everything but preprocessing"),
        _package("megatron-core", "needed for training: pip install 'megatron-core>=0.19,<0.20'"),
        _package("transformers", "needed for conversion and evaluation"),
        *_devices(),
        _kernels(),
        _transformer_engine(),
        find_apex(),
    ]


def find_apex(search_path: list[str] | None = None) -> MachineFact:
    """Say whether NVIDIA Apex is there, or the unrelated web library that has its name."""
    spec = PathFinder.find_spec("apex", search_path)
    if spec is None or not spec.submodule_search_locations:
        return MachineFact(
            "NVIDIA Apex",
            "not found",
            "optional",
            "not needed where Transformer Engine is; it is built from NVIDIA's source and is not "
            "on the package registry (the package called apex there is something else)",
        )
    folder = Path(next(iter(spec.submodule_search_locations)))
    if not all((folder / part).is_dir() for part in ("optimizers", "normalization")):
        return MachineFact(
            "NVIDIA Apex",
            f"a package called apex that is not NVIDIA's ({folder})",
            "missing",
            "it is an unrelated web library and would be imported in Apex's place: "
            "pip uninstall apex",
        )
    if PathFinder.find_spec("amp_C", search_path) is not None:
        return MachineFact("NVIDIA Apex", "found")
    return MachineFact(
        "NVIDIA Apex",
        "found, without its compiled parts (amp_C)",
        "missing",
        "Megatron would choose its optimizer and fail: rebuild it with its C++ and CUDA extensions",
    )


def _package(name: str, purpose: str) -> MachineFact:
    try:
        return MachineFact(name, str(version(name)))
    except PackageNotFoundError:
        return MachineFact(name, "not installed", "missing", purpose)


def _devices() -> list[MachineFact]:
    import torch

    if not torch.cuda.is_available():
        found = "none: training runs on the CPU, through gloo"
        return [MachineFact("GPU", found, "optional", "fine for trying things out and for tests")]
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    nccl = ".".join(map(str, torch.cuda.nccl.version()))  # type: ignore[no-untyped-call]
    return [MachineFact("GPU", ", ".join(names)), MachineFact("NCCL", nccl)]


def _kernels() -> MachineFact:
    """Name the kernels that `--infoentropy-backend auto` chooses here."""
    import torch

    from megatron_infoentropy.kernels import dispatch, native

    device = find_device()
    reasons = dispatch.unavailable(torch.device(device.type), torch.float32)
    name = next(name for name, reason in reasons.items() if reason is None)
    if name != "reference":
        instructions = f" ({native.instruction_set()})" if name == "native" else ""
        return MachineFact("InfoEntropy kernels", name + instructions)
    compiled = ("native",) if device.type == "cpu" else ("triton", "cuda")
    missing = "; ".join(f"not {each}, since {reasons[each]}" for each in compiled)
    if device.type == "cuda":
        advice = "install the PyTorch that is made for this GPU, which brings Triton"
    elif any(shutil.which(compiler) for compiler in ("c++", "g++", "clang++")):
        advice = "reinstall the package"
    else:
        advice = "install a C++ compiler, then reinstall"
    return MachineFact("InfoEntropy kernels", f"PyTorch reference ({missing})", "optional", advice)


def _transformer_engine() -> MachineFact:
    if PathFinder.find_spec("transformer_engine") is None:
        return MachineFact(
            "Transformer Engine",
            "not found",
            "optional",
            "on a GPU machine: pip install 'megatron-infoentropy[gpu]'; FP8 needs it",
        )
    try:
        return MachineFact("Transformer Engine", str(version("transformer-engine")))
    except PackageNotFoundError:  # built from source
        return MachineFact("Transformer Engine", "found, of unknown version")
