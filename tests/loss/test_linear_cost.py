"""What the fused linear holds in memory, sends over the group, and in which order."""

import itertools
from collections import Counter
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from linear_cases import (
    BOTH,
    COLLECTIVES,
    fused_loss,
    random_inputs,
    recorded,
    statistics_objective,
    unfused_objective,
)
from ranks import run_ranks

from megatron_infoentropy.bench.timing import peak_mib
from megatron_infoentropy.loss import linear_chunks, linear_objective

N, H, V, CHUNK = 1024, 16, 512, 128


def make_case(world=1, tokens=N):
    return random_inputs(tokens, H, V, columns=V // world)


def peak_on_rank(function, chunk):
    group = dist.group.WORLD
    return peak_of(function, make_case(group.size()), chunk_tokens=chunk, group=group)


def peak_of(function, case, **options):
    return peak_mib(lambda: function(*case, **options).backward(), case[0].device) * 2**20


GRADIENTS = (N + V) * H * 4
PER_TOKEN = 160 * N  # statistics, coefficients, results and their temporaries


@BOTH
def test_without_ranks_memory_is_one_chunk_of_logits_and_the_gradients(function):
    peak = peak_of(function, make_case(), chunk_tokens=CHUNK)
    chunk = CHUNK * V * 4
    assert chunk + GRADIENTS <= peak <= chunk + GRADIENTS + PER_TOKEN


def test_the_measurement_sees_the_logits_of_the_unfused_loss():
    assert peak_of(unfused_objective, make_case(), inplace_backward=True) >= N * V * 4


@pytest.mark.parametrize(("function", "chunks"), [(statistics_objective, 1), (fused_loss, 2)])
def test_on_ranks_memory_is_the_promised_chunks_and_the_gradients(function, chunks):
    logits = chunks * CHUNK * V // 2 * 4
    gradients = (N + V // 2) * H * 4
    for peak in run_ranks(peak_on_rank, 2, function, CHUNK):
        assert logits + gradients <= peak <= logits + gradients + 2 * PER_TOKEN


def count_on_rank(function, sequence_parallel, all_ignored):
    group = dist.group.WORLD
    hidden, weight, target = make_case(group.size(), tokens=20)
    if sequence_parallel:
        hidden = hidden.detach().chunk(group.size())[group.rank()].requires_grad_()
    if all_ignored:
        target = torch.full_like(target, -100)
    options = {"group": group, "chunk_tokens": 6, "sequence_parallel": sequence_parallel}
    options["skip_masked"] = False  # shapes and collectives depend on no data then
    with recorded() as forward:
        loss = function(hidden, weight, target, **options)
    with recorded() as backward:
        loss.backward()
    return [dict(Counter(name for name, _ in sent)) for sent in (forward, backward)]


GATHER, REDUCE, SCATTER = COLLECTIVES[:3]


@pytest.mark.parametrize("all_ignored", [False, True])
@pytest.mark.parametrize(
    ("function", "sequence_parallel", "forward", "backward"),
    [
        (statistics_objective, False, {GATHER: 1}, {REDUCE: 4}),
        (statistics_objective, True, {GATHER: 1 + 4}, {GATHER: 4, SCATTER: 4}),
        (fused_loss, False, {GATHER: 4, REDUCE: 4}, {}),
        (fused_loss, True, {GATHER: 4 + 4, SCATTER: 4}, {}),
    ],
)
def test_collectives_are_as_many_as_chunks_and_do_not_depend_on_data(
    function, sequence_parallel, forward, backward, all_ignored
):
    """20 tokens in chunks of at most 6: four."""
    for counted in run_ranks(count_on_rank, 2, function, sequence_parallel, all_ignored):
        assert counted == [forward, backward]


def order_on_rank():
    """What the forward pass of the loss does on slices of the sequence, in order: "what chunk"."""
    happened, group = [], dist.group.WORLD

    def noted(what, module, name):
        function, chunks = getattr(module, name), itertools.count(1)

        def call(*arguments):
            chunk = next(chunks)
            happened.append(f"{what} {chunk}")
            result = function(*arguments)
            if what != "gather":
                return result
            return lambda: happened.append(f"fold {chunk}") or result()

        return mock.patch.object(module, name, call)

    with (
        noted("hidden", linear_chunks, "_start_gather"),
        noted("logits", linear_chunks, "logits_of"),
        noted("gather", linear_objective, "start_join"),
    ):
        hidden, weight, target = make_case(2, tokens=16)
        hidden = hidden.detach().chunk(2)[group.rank()].requires_grad_()
        fused_loss(hidden, weight, target, group=group, chunk_tokens=6, sequence_parallel=True)
    return happened


def test_the_next_chunk_is_under_way_before_a_gather_is_waited_for():
    for order in run_ranks(order_on_rank, 2):
        assert order == [
            *("hidden 1", "hidden 2", "logits 1", "gather 1"),
            *("hidden 3", "logits 2", "gather 2", "fold 1"),
            *("logits 3", "gather 3", "fold 2", "fold 3"),
        ]
