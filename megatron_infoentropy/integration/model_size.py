"""How many parameters the whole model has, whatever the layout it is spread over."""

from typing import Any

import torch
from megatron.core import mpu
from megatron.core.tensor_parallel import param_is_not_tensor_parallel_duplicate
from megatron.training import print_rank_0


def announce_size(model: list[Any]) -> list[Any]:
    """Print "model parameters: N" once; a `pre_wrap_hooks` entry of a Megatron model configuration.

    Copies that tensor-parallel ranks or tied pipeline stages hold of one parameter count once.
    """
    own = sum(
        parameter.numel()
        for chunk in model
        for parameter in chunk.parameters()
        if param_is_not_tensor_parallel_duplicate(parameter)
        and not getattr(parameter, "shared", False)
    )
    total = torch.tensor(own, dtype=torch.int64, device=torch.cuda.current_device())
    torch.distributed.all_reduce(total, group=mpu.get_model_parallel_group())
    print_rank_0(f"model parameters: {total.item()}")
    return model
