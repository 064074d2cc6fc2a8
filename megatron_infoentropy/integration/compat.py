"""What installed Megatron versions need beyond their own code, and nothing else."""

from importlib.util import find_spec
from pathlib import Path

from megatron_infoentropy.runtime import cpu


def prepare_megatron() -> None:
    """Call once per process, before `megatron.training.pretrain`."""
    _use_shipped_dataset_helpers()
    if cpu.is_installed():
        _fork_checkpoint_writers()


def _use_shipped_dataset_helpers() -> None:
    """Skip `make` where there is nothing to make.

    The 0.19 wheel ships the compiled dataset helpers but not their Makefile; Megatron runs make all
    the same and ends the process when it fails. A source checkout, which has one, is left alone.
    """
    from megatron.core.datasets import utils

    has_makefile = (Path(utils.__file__).parent / "Makefile").exists()
    if not has_makefile and find_spec("megatron.core.datasets.helpers_cpp") is not None:
        utils.compile_helpers = lambda: None


def _fork_checkpoint_writers() -> None:
    """Fork the processes that write checkpoints; by default each imports torch again.

    Forking is unsafe once a process has a CUDA context, which on a CPU it never has.
    """
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    filesystem_async.get_write_results_queue("fork")
