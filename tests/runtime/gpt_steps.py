"""Run by test_cpu.py in a process of its own: Megatron's GPT model and optimizer on the CPU.

Trains a model of two layers on one repeated batch and prints its losses as JSON. Everything asks
for "cuda" as code written for a GPU does.
"""

import json
import sys

from megatron_infoentropy.runtime import cpu

cpu.install()

import torch  # noqa: E402
from megatron.core import parallel_state, tensor_parallel  # noqa: E402
from megatron.core.distributed import (  # noqa: E402
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.models.gpt import GPTModel  # noqa: E402
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec  # noqa: E402
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer  # noqa: E402
from megatron.core.transformer import TransformerConfig  # noqa: E402

VOCABULARY, SEQUENCE = 64, 16


def build_model() -> GPTModel:
    config = TransformerConfig(
        num_layers=2,
        hidden_size=32,
        num_attention_heads=4,
        use_cpu_initialization=True,
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        attention_dropout=0.1,  # drawn from Megatron's own random-state tracker
        pipeline_dtype=torch.float32,
    )
    return GPTModel(
        config,
        get_gpt_layer_local_spec(normalization="RMSNorm"),
        vocab_size=VOCABULARY,
        max_sequence_length=SEQUENCE,
        position_embedding_type="rope",
    ).cuda()


def train(steps: int) -> list[float]:
    model = build_model()
    model = DistributedDataParallel(model.config, DistributedDataParallelConfig(), model)
    optimizer = get_megatron_optimizer(OptimizerConfig(lr=1e-2, clip_grad=1.0), [model])
    tokens = torch.randint(VOCABULARY, (2, SEQUENCE + 1), device="cuda")
    positions = torch.arange(SEQUENCE, device=torch.cuda.current_device()).expand(2, -1)
    mask = torch.ones(1, 1, SEQUENCE, SEQUENCE, dtype=torch.bool, device="cuda").triu(1)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        model.zero_grad_buffer()
        loss = model(tokens[:, :-1], positions, mask, labels=tokens[:, 1:]).mean()
        loss.backward()
        finalize_model_grads([model])
        optimizer.step()
        losses.append(loss.item())
    return losses


if __name__ == "__main__":
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.FileStore(sys.argv[1], 1), rank=0, world_size=1
    )
    parallel_state.initialize_model_parallel()
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    sys.stdout.write(json.dumps(train(steps=5)))
    torch.distributed.destroy_process_group()
