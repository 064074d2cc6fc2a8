"""Run on every rank: our trainer as `torchrun -m megatron_infoentropy.pretrain` runs it."""

from megatron_infoentropy import pretrain


def main():
    from megatron_infoentropy.integration.compat import prepare_megatron

    prepare_megatron()
    pretrain.train()
