"""Which of Megatron's flags and environment variables this machine asks for."""

import os
from importlib.util import find_spec
from typing import Any

from megatron_infoentropy.runtime.device import Device

# With a GPU but without Transformer Engine, Megatron has PyTorch's layers to fall back on.
PLAIN_GPU_FLAGS = (
    "--transformer-impl=local",
    "--no-persist-layer-norm",
    "--no-rope-fusion",
    "--no-masked-softmax-fusion",
)
# Without this kernel of Apex, Megatron's output layer raises, whoever makes the other layers.
FUSION_KERNEL = "fused_weight_gradient_mlp_cuda"
NO_FUSION_FLAG = "--no-gradient-accumulation-fusion"


def machine_flags(device: Device, recipe: dict[str, Any]) -> list[str]:
    """Flags to put before a recipe on this machine; what the recipe says comes later and wins."""
    if device.type == "cpu":
        from megatron_infoentropy.runtime.cpu import CPU_FLAGS  # takes torch's seconds to import

        return list(CPU_FLAGS)
    has_layers = "transformer-impl" in recipe or find_spec("transformer_engine") is not None
    flags = [] if has_layers else list(PLAIN_GPU_FLAGS)
    return flags if find_spec(FUSION_KERNEL) else [*flags, NO_FUSION_FLAG]


def machine_environment(device: Device, ranks: int) -> dict[str, str]:
    """Environment variables for the ranks; those already set stay as they are."""
    wanted = {
        "CUDA_DEVICE_MAX_CONNECTIONS": "1",  # tensor parallelism relies on the order of launches
        "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // ranks)),
        "PYTHONUNBUFFERED": "1",
    }
    if device.type == "cpu":
        wanted["TORCHDYNAMO_DISABLE"] = "1"  # Megatron compiles small functions; not worth it here
    return {name: os.environ.get(name, value) for name, value in wanted.items()}
