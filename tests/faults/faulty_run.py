"""Run on every rank: our trainer, with one rank late for a step and, later, NaN in its logits."""

import logging
import os
import sys
import time

from megatron_infoentropy import pretrain

LATE, BROKEN, FAULTY_RANK = 5, 8, "1"  # iterations, counted from 1


def main():
    from megatron.training import get_args

    from megatron_infoentropy.integration import output, step
    from megatron_infoentropy.integration.compat import prepare_megatron

    logging.basicConfig(stream=sys.stderr, force=True)  # not the fork server's
    prepare_megatron()
    statistics = output.configured_statistics

    def faulty(logits, *arguments, **options):
        iteration = get_args().curr_iteration + 1
        if os.environ["RANK"] == FAULTY_RANK and iteration == LATE:
            time.sleep(2)
        if os.environ["RANK"] == FAULTY_RANK and iteration == BROKEN:
            logits = logits * float("nan")
        return statistics(logits, *arguments, **options)

    output.configured_statistics = faulty
    assert step.statistics_processor is output.statistics_processor
    pretrain.train()
