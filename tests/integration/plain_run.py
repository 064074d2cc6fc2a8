"""Run on every rank: our trainer as `torchrun -m megatron_infoentropy.pretrain` runs it."""

from megatron_infoentropy import pretrain as ours


def main():
    from megatron.core.enums import ModelType
    from megatron.training import pretrain

    from megatron_infoentropy.integration.batch import build_datasets
    from megatron_infoentropy.integration.compat import prepare_megatron

    prepare_megatron()
    container, forward_step = ours.prepare()
    pretrain(container, build_datasets, ModelType.encoder_or_decoder, forward_step)
