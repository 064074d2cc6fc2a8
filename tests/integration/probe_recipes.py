"""What test_recipes.py lets a forked process do: parse a recipe for a world that is not there,
build its model without memory, on the meta device, and tell what came of it."""

import dataclasses
import json
import os

import torch


def parse(world, output, ranks=(), *, on_local_layers=True):
    """Write {"shape", "arguments", "built": {rank: its parameters}} of the command line."""
    os.environ["WORLD_SIZE"] = str(world)
    from megatron.training import get_args

    from megatron_infoentropy import pretrain
    from megatron_infoentropy.launch.parsed import shape_of

    container, _ = pretrain.prepare()
    if on_local_layers:
        container.model.transformer.transformer_impl = "local"
        container.model.transformer.fp8 = None
        container.model.transformer.sequence_parallel = False  # the local norms refuse it
    args = get_args()
    found = {
        "shape": dataclasses.asdict(shape_of(args)),
        "arguments": {name: repr(value) for name, value in vars(args).items()},
        "built": {rank: _parameters(container, rank, world) for rank in ranks},
    }
    output.write_text(json.dumps(found))


def _parameters(container, rank, world):
    """How many a rank of the fake world has; its tensors have shapes and no memory."""
    from megatron.core import mpu
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.training.models.gpt import GPTModelBuilder
    from torch.testing._internal.distributed.fake_pg import FakeStore

    config = container.model.transformer
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
    mpu.initialize_model_parallel(
        config.tensor_model_parallel_size,
        config.pipeline_model_parallel_size,
        create_gloo_process_groups=False,
    )
    with torch.device("meta"):
        groups = ProcessGroupCollection.use_mpu_process_groups()
        model = GPTModelBuilder(container.model).build_model(groups)
    matrices = [parameter for parameter in model.parameters() if parameter.dim() == 2]
    assert {parameter.device.type for parameter in matrices} == {"meta"}
    mpu.destroy_model_parallel()
    torch.distributed.destroy_process_group()
    return sum(parameter.numel() for parameter in model.parameters())
