"""Run on every rank: Megatron's real trainer with our loss, every rank writing down its gradients.

The learning rate is 0 and each iteration uses another gamma, so that one start serves several.
"""

import dataclasses

import torch

from megatron_infoentropy import pretrain as ours

MASKED_SHARE = (0.1, 0.5, 0.8)  # by (data rank + micro-batch): masks are far from equal


def make_batch(data_rank, micro_batch, size, sequence, vocab, kind="plain"):
    """The same tokens on every rank of a layout; position 0 is never masked.

    kind "empty": data rank 0 has no valid token in micro-batch 1.
    """
    generator = torch.Generator().manual_seed(1000 * data_rank + micro_batch)
    text = torch.randint(0, vocab, (size, sequence + 1), generator=generator)
    share = MASKED_SHARE[(data_rank + micro_batch) % len(MASKED_SHARE)]
    mask = (torch.rand(size, sequence, generator=generator) >= share).float()
    mask[:, 0] = 1
    if kind == "empty" and (data_rank, micro_batch) == (0, 1):
        mask.zero_()
    return {
        "tokens": text[:, :-1].contiguous(),
        "labels": text[:, 1:].contiguous(),
        "loss_mask": mask,
        "position_ids": torch.arange(sequence).expand(size, -1).contiguous(),
        "attention_mask": torch.ones(sequence, sequence, dtype=torch.bool).triu(1)[None, None],
    }


def main(folder, gammas, kind="plain"):
    """kind "packed": batches are Megatron's own, of documents of a few tokens, and written down;
    "into main_grad": the output layer is told to add to it, for which Megatron's own code needs a
    CUDA extension and is refused on a CPU, and ours does not."""
    from megatron.core import mpu
    from megatron.core.datasets.gpt_dataset import MockGPTLowLevelDataset
    from megatron.core.distributed import finalize_model_grads
    from megatron.training import get_args, get_tokenizer

    from megatron_infoentropy.integration import step

    container, forward_step = ours.prepare()
    transformer = container.model.transformer
    finalize = transformer.finalize_model_grads_func or finalize_model_grads
    found = {"parameters": {}, "gradients": [], "batches": []}
    read = step.get_batch
    served = {}  # batches by model chunk: each asks for all of them, in order

    def get_batch(iterator, stage, config, *, training):
        if kind == "packed":
            found["batches"].append(read(iterator, stage, config, training=training))
            return found["batches"][-1]
        args = get_args()
        micro_batches = args.global_batch_size // args.micro_batch_size // args.data_parallel_size
        index = served.get(stage, 0) % micro_batches
        served[stage] = served.get(stage, 0) + 1
        return make_batch(
            mpu.get_data_parallel_rank(),
            index,
            args.micro_batch_size,
            args.seq_length,
            get_tokenizer().vocab_size,
            kind,
        )

    def write_down(model, *arguments, **options):
        finalize(model, *arguments, **options)
        named = {
            f"{chunk}.{name}": p
            for chunk, part in enumerate(model)
            for name, p in part.module.named_parameters()
        }
        found["parameters"] = {name: p.detach().clone() for name, p in named.items()}
        found["gradients"].append({name: p.main_grad.clone() for name, p in named.items()})
        if len(found["gradients"]) < len(gammas):
            use_gamma(len(found["gradients"]))

    def use_gamma(index):
        forward_step.config = dataclasses.replace(forward_step.config, gamma=gammas[index])

    def fuse_accumulation(chunks):
        for chunk in chunks:
            if chunk.post_process:
                chunk.output_layer.gradient_accumulation_fusion = True
        return chunks

    if kind == "into main_grad":
        container.model.pre_wrap_hooks.append(fuse_accumulation)
    MockGPTLowLevelDataset.max_sequence_length = 9
    step.get_batch = get_batch
    transformer.finalize_model_grads_func = write_down
    use_gamma(0)
    ours.run(container, forward_step)
    found["vocab_size"] = get_tokenizer().vocab_size
    ranks = (
        mpu.get_pipeline_model_parallel_rank(),
        mpu.get_tensor_model_parallel_rank(),
        mpu.get_data_parallel_rank(),
    )
    torch.save(found, folder / f"{ranks[0]}-{ranks[1]}-{ranks[2]}.pt")
