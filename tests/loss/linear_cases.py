"""Scalars by both functions of the fused linear and by logits, and random inputs for them."""

from contextlib import contextmanager
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from megatron_infoentropy import InfoEntropyConfig, vocab_parallel_statistics
from megatron_infoentropy.loss.linear import (
    linear_infoentropy_loss,
    linear_vocab_parallel_statistics,
)


def unfused_objective(hidden, weight, target, **options):
    """By the logits of all tokens."""
    got = vocab_parallel_statistics(hidden @ weight.T, target, **options)
    return ((1 + got.entropy.detach()) * got.cross_entropy).sum()


def statistics_objective(hidden, weight, target, **options):
    """By the function that makes logits twice."""
    got = linear_vocab_parallel_statistics(hidden, weight, target, **options)
    return ((1 + got.entropy.detach()) * got.cross_entropy).sum()


def fused_loss(
    hidden, weight, target, *, chunk_tokens=4096, backend="auto", skip_masked=True, **options
):
    """By the function that makes them once."""
    config = InfoEntropyConfig(backend=backend, chunk_tokens=chunk_tokens, skip_masked=skip_masked)
    return linear_infoentropy_loss(hidden, weight, target, config, **options)


EVERY = pytest.mark.parametrize("function", [unfused_objective, statistics_objective, fused_loss])
BOTH = pytest.mark.parametrize("function", [statistics_objective, fused_loss])


def random_inputs(tokens, width, vocabulary, *, dtype=torch.float32, device="cpu", columns=None):
    """(hidden, weight, target); `columns` of the vocabulary where the weight is a shard."""
    generator = torch.Generator().manual_seed(8)
    hidden = torch.randn(tokens, width, generator=generator).to(device, dtype).requires_grad_()
    weight = torch.randn(columns or vocabulary, width, generator=generator).to(device, dtype)
    target = torch.randint(0, vocabulary, (tokens,), generator=generator).to(device)
    return hidden, weight.requires_grad_(), target


COLLECTIVES = (
    "all_gather_into_tensor",
    "all_reduce",
    "reduce_scatter_tensor",
    "all_gather",
    "reduce_scatter",
    "broadcast",
)


@contextmanager
def recorded():
    """The collectives that are called meanwhile, in order: [(name, bytes of what a rank sends)]."""
    sent = []

    def noted(name, function):
        def call(*tensors, **options):
            sent.append((name, tensors[-1].nbytes))
            return function(*tensors, **options)

        return call

    with mock.patch.multiple(dist, **{n: noted(n, getattr(dist, n)) for n in COLLECTIVES}):
        yield sent
