"""Run on every rank: our trainer as it is, without what a daemonic process may not do."""

from megatron_infoentropy import pretrain as ours


def main():
    from megatron.core.enums import ModelType
    from megatron.training import pretrain

    from megatron_infoentropy.integration.batch import build_datasets

    container, forward_step = ours.prepare()
    pretrain(container, build_datasets, ModelType.encoder_or_decoder, forward_step)
