"""What test_recipes.py lets a forked process do: parse a recipe for a world that is not there,
build its model without memory, on the meta device, and tell what came of it."""

import json
import os

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def parse(world, output, ranks=(), *, on_local_layers=True):
    """Write {"shape", "arguments", "built": {rank: its parameters}} of the command line."""
    os.environ["WORLD_SIZE"] = str(world)
    from megatron.training import get_args

    from megatron_infoentropy import pretrain
    from megatron_infoentropy.integration.hybrid import local_stack_spec
    from megatron_infoentropy.launch.parsed import plain_arguments

    container, _ = pretrain.prepare()
    if on_local_layers:
        container.model.transformer.transformer_impl = "local"
        container.model.transformer.fp8 = None
        container.model.transformer.sequence_parallel = False  # the local norms refuse it
        if get_args().hybrid_layer_pattern is not None:
            container.model.hybrid_stack_spec = local_stack_spec(container.model.transformer)
    args = get_args()
    found = {
        "shape": plain_arguments(args),
        "arguments": {name: repr(value) for name, value in vars(args).items()},
        "built": {rank: _parameters(container, rank, world) for rank in ranks},
    }
    output.write_text(json.dumps(found))


def _parameters(container, rank, world):
    """How many a rank of the fake world has; its tensors have shapes and no memory."""
    from megatron.core import mpu
    from megatron.core.process_groups_config import ProcessGroupCollection
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
        model = container.model.get_builder_cls()(container.model).build_model(groups)
    matrices = [parameter for parameter in model.parameters() if parameter.dim() == 2]
    assert {parameter.device.type for parameter in matrices} == {"meta"}
    mpu.destroy_model_parallel()
    torch.distributed.destroy_process_group()
    return sum(parameter.numel() for parameter in model.parameters())


def train(output):
    """Train; write {parameter: standard deviation} of the model as it was built."""
    from megatron.core.enums import ModelType
    from megatron.training import pretrain as megatron_pretrain

    from megatron_infoentropy import pretrain
    from megatron_infoentropy.integration.batch import build_datasets

    container, forward_step = pretrain.prepare()

    def write_down(chunks):
        named = {name: p for chunk in chunks for name, p in chunk.named_parameters() if p.dim() > 1}
        output.write_text(json.dumps({name: float(p.std()) for name, p in named.items()}))
        return chunks

    container.model.pre_wrap_hooks.append(write_down)
    megatron_pretrain(container, build_datasets, ModelType.encoder_or_decoder, forward_step)


# What a ring sends of the larger side of a collective over k ranks, in units of (k - 1) / k.
RING = {
    "allreduce_": 2,
    "_allgather_base_": 1,
    "allgather_into_tensor_coalesced_": 1,
    "reduce_scatter_tensor_coalesced_": 1,
}


class Sent(TorchDispatchMode):
    """[operation, ranks of its group, shape, bytes that this rank sends] of all communication."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        namespace, _, name = func._schema.name.partition("::")
        if namespace == "c10d" and (name in RING or name == "send"):
            group = next(a for a in args if isinstance(a, torch.ScriptObject) and _is_group(a))
            tensors = [leaf for leaf in tree_leaves(args) if isinstance(leaf, torch.Tensor)]
            largest = max(tensors, key=lambda tensor: tensor.nbytes)
            ranks = torch.distributed.ProcessGroup.unbox(group).size()
            share = 1 if name == "send" else RING[name] * (ranks - 1) / ranks
            self.calls.append((name, ranks, list(largest.shape), largest.nbytes * share))
        return func(*args, **kwargs or {})


def _is_group(value):
    return "ProcessGroup" in str(value._type())


def count_traffic(world, output):
    """Train as rank 0 of a world whose other ranks are not there; write what it would have sent."""
    os.environ["WORLD_SIZE"] = str(world)
    from megatron.training import get_args

    from megatron_infoentropy import pretrain
    from megatron_infoentropy.launch.parsed import plain_arguments

    with Sent() as sent:
        pretrain.main()
    found = {"shape": plain_arguments(get_args()), "sent": sent.calls}
    output.write_text(json.dumps(found))
