"""Four numbers of every token from a batch's logits, by one read of them where they lie."""

from typing import NamedTuple

import torch

from megatron_infoentropy import kernels
from megatron_infoentropy.evaluate.windows import IGNORED
from megatron_infoentropy.kernels.contract import PLAIN, Shard
from megatron_infoentropy.loss.collective import merge_shards
from megatron_infoentropy.loss.layout import as_rows
from megatron_infoentropy.loss.statistics import token_results


class TokenScores(NamedTuple):
    """Of the scored tokens, in the order of the targets; fp32 on the CPU, nats, each [scored]."""

    ce: torch.Tensor
    entropy: torch.Tensor
    confidence: torch.Tensor  # probability of the most probable token
    correct: torch.Tensor  # bool: no token is more probable than the target


def token_scores(logits: torch.Tensor, target: torch.Tensor) -> TokenScores:
    """Score logits [..., vocabulary] of any floating dtype against targets [...], in fp32.

    Rows whose target is `IGNORED` are not read. The public loss function gives all of this but the
    confidence, 1 / sum e^(x - max), which the same read of the logits knows.
    """
    rows = as_rows(logits, target.to(logits.device))
    vocabulary = logits.shape[-1]
    backend = kernels.select("auto", logits.device, logits.dtype)
    shard = Shard(0, vocabulary, IGNORED)
    statistics = backend.shard_statistics(rows.logits_NV, rows.target_N, shard, PLAIN)
    row = merge_shards(statistics[None], [vocabulary])
    results, saved = token_results(row, rows.target_N, vocabulary, IGNORED, PLAIN)
    columns = (results.cross_entropy, results.entropy, 1 / saved.z, results.is_top)
    every = torch.stack([rows.restore(column, target) for column in columns]).cpu()
    scored = every[:, target.cpu() != IGNORED]
    return TokenScores(scored[0], scored[1], scored[2], scored[3] > 0)
