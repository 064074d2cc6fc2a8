"""The loss in your own Megatron-Core training, one line after the model is built.

Run it: `torchrun --nproc-per-node 2 examples/drop_in.py` (two tensor-parallel ranks; without a GPU
they run on the CPU). The one line that is ours is marked; the model is a toy, so it takes seconds.
"""

from megatron_infoentropy.runtime import cpu

cpu.install()  # only so that this example runs without a GPU; does nothing where there is one

import os  # noqa: E402

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from megatron.core import parallel_state, tensor_parallel  # noqa: E402
from megatron.core.models.gpt import GPTModel  # noqa: E402
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec  # noqa: E402
from megatron.core.transformer import TransformerConfig  # noqa: E402

from megatron_infoentropy import InfoEntropyConfig  # noqa: E402
from megatron_infoentropy.integration import use_infoentropy_loss  # noqa: E402
from megatron_infoentropy.integration.dropin import bound_loss  # noqa: E402
from megatron_infoentropy.runtime.device import find_device  # noqa: E402

VOCABULARY, SEQUENCE, BATCH = 512, 32, 4


def build_model() -> GPTModel:
    """Yours: any Megatron-Core model."""
    config = TransformerConfig(
        num_layers=2,
        hidden_size=64,
        num_attention_heads=4,
        tensor_model_parallel_size=dist.get_world_size(),
        use_cpu_initialization=True,
        pipeline_dtype=torch.float32,
    )
    return GPTModel(config, get_gpt_layer_local_spec(), VOCABULARY, SEQUENCE).cuda()


def main() -> None:
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group(find_device().backend)
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=dist.get_world_size())
    tensor_parallel.model_parallel_cuda_manual_seed(0)
    torch.manual_seed(0)

    model = build_model()
    use_infoentropy_loss(model, InfoEntropyConfig(gamma=1.0))  # ours: this line
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)

    tokens = torch.randint(VOCABULARY, (BATCH, SEQUENCE + 1)).cuda()
    positions = torch.arange(SEQUENCE).expand(BATCH, -1).cuda()
    mask = torch.ones(1, 1, SEQUENCE, SEQUENCE, dtype=torch.bool).triu(1).cuda()
    for step in range(20):
        optimizer.zero_grad()
        losses = model(tokens[:, :-1], positions, mask, labels=tokens[:, 1:])  # [batch, sequence]
        losses.mean().backward()
        optimizer.step()
        if dist.get_rank() == 0 and step % 5 == 4:
            print(f"step {step + 1}: InfoEntropy objective {losses.mean().item():.4f}")  # noqa: T201
    if dist.get_rank() == 0:
        proof = bound_loss(model)
        print(f"{proof.training_calls} micro-batches with {proof.config}")  # noqa: T201
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
