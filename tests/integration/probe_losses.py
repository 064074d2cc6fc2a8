"""Run on every rank: a training run that writes down its losses, with full precision.

ours: our forward step. megatron: the same batches through the model's own loss, summed as
Megatron's training script does. dropin: the latter with the loss bound to the model.
"""

import json
from functools import partial

import torch

from megatron_infoentropy import pretrain as package


def main(out, mode):
    from megatron.core import mpu
    from megatron.core.enums import ModelType
    from megatron.core.utils import get_attr_wrapped_model
    from megatron.training import get_args, pretrain

    from megatron_infoentropy.integration import use_infoentropy_loss
    from megatron_infoentropy.integration.arguments import config_from_args
    from megatron_infoentropy.integration.batch import build_datasets, get_batch
    from megatron_infoentropy.integration.compat import prepare_megatron

    prepare_megatron()
    container, forward_step = package.prepare()
    losses = []

    def write_down(loss_function, output):
        result = loss_function(output)
        losses.append([float(result[0].detach()), int(result[1])])
        return result

    def own_loss(loss_mask, output):
        loss = torch.sum(output.view(-1).float() * loss_mask.view(-1).float())
        count = loss_mask.sum().to(torch.int)
        return loss, count, {"lm loss": torch.stack([loss.detach(), count])}

    def megatron_step(data_iterator, model):
        batch = get_batch(
            data_iterator, None, get_attr_wrapped_model(model, "config"), training=True
        )
        mask = batch.pop("loss_mask")
        output = model(
            batch["tokens"], batch["position_ids"], batch["attention_mask"], labels=batch["labels"]
        )
        return output, partial(own_loss, mask)

    inner = forward_step if mode == "ours" else megatron_step

    def step(data_iterator, model):
        output, loss_function = inner(data_iterator, model)
        return output, partial(write_down, loss_function)

    if mode == "dropin":
        container.model.pre_wrap_hooks.append(
            lambda chunks: [
                use_infoentropy_loss(chunk, config_from_args(get_args())) for chunk in chunks
            ]
        )
    try:
        pretrain(container, build_datasets, ModelType.encoder_or_decoder, step)
    except SystemExit as end:  # --exit-interval ends the process
        if end.code:
            raise
    ranks = mpu.get_tensor_model_parallel_rank(), mpu.get_data_parallel_rank()
    if mpu.is_pipeline_last_stage() and ranks == (0, 0):
        out.write_text(json.dumps(losses))
