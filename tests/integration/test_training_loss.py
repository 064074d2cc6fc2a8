"""The trainer's loss function alone, over four gloo ranks and Megatron's ways to split a batch.

    data: every rank has sequences of its own;
    sequence: ranks of a tensor-parallel group hold slices of the sequence, Megatron's output layer
        gathers them, and each gets back the gradient of its slice;
    context: a rank holds the first and the last of 2 CP chunks (rank 1 the second and last but
        one), and alpha is one number per micro-batch of a data-parallel replica.

The trainers of the latter two need norms and attention of Transformer Engine; what the loss does
there is tested here.
"""

from itertools import product
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from close import assert_within
from launch import run_forked
from megatron.core import parallel_state as mpu
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.utils import get_batch_on_this_cp_rank
from oracle import dense_statistics, dense_weight

from megatron_infoentropy import InfoEntropyConfig
from megatron_infoentropy.integration.output import pack
from megatron_infoentropy.integration.step import Groups, training_loss
from megatron_infoentropy.loss.statistics import vocab_parallel_statistics

S, B, H, V, RANKS = 8, 2, 6, 24, 4
GAMMA = 2.0
LAYOUTS = {
    "data": {},
    "sequence": {"tensor_model_parallel_size": 2},
    "context": {"context_parallel_size": 2},
}
CASES = [*product(("paper", "global", "none"), ("infoentropy", "focal"), (True, False))]
REPORTED = ("objective", "cross entropy", "entropy", "accuracy", "weight")


def make_replica(index):
    """(hidden [S, B, H], target [B, S], mask [B, S]); masks are far from equal along a sequence."""
    generator = torch.Generator().manual_seed(index)
    hidden = torch.randn(S, B, H, generator=generator, dtype=torch.float64)
    target = torch.randint(0, V, (B, S), generator=generator)
    likely = torch.linspace(0.1, 0.9, S) if index else torch.linspace(0.9, 0.1, S)
    mask = (torch.rand(B, S, generator=generator) < likely).double()
    mask[:, 0] = 1
    return hidden, target, mask


def make_weight():
    generator = torch.Generator().manual_seed(99)
    return torch.randn(V, H, generator=generator, dtype=torch.float64)


def losses_on_rank():
    """{(layout, case): what the loss gives}: one start of the ranks serves all."""
    found = {}
    for layout, sizes in LAYOUTS.items():
        mpu.initialize_model_parallel(**sizes)
        for case in CASES:
            found[layout, case] = loss_on_rank(*case)
        mpu.destroy_model_parallel()
    return found


def loss_on_rank(normalization, objective, detach):
    """The report's means over all ranks, the token count, and gradients of what the rank holds."""
    tensor, context = mpu.get_tensor_model_parallel_group(), mpu.get_context_parallel_group()
    data = mpu.get_data_parallel_group()
    hidden, target, mask = make_replica(data.rank())
    weight, found = make_weight(), {}
    if tensor.size() > 1:
        found["slice"] = hidden.chunk(2)[tensor.rank()].clone().requires_grad_()
        found["shard"] = weight.chunk(2)[tensor.rank()].clone().requires_grad_()
        whole = gather_from_sequence_parallel_region(found["slice"], group=tensor)
        logits = whole @ found["shard"].T
    else:
        batch = {
            "tokens": torch.arange(S).expand(B, S).contiguous(),
            "labels": target,
            "loss_mask": mask,
            "logits": (hidden @ weight.T).transpose(0, 1).contiguous(),
        }
        batch = get_batch_on_this_cp_rank(batch, is_hybrid_cp=False, cp_group=context)
        target, mask = batch["labels"], batch["loss_mask"]
        logits = batch["logits"].transpose(0, 1).contiguous().requires_grad_()
        found["logits"] = logits
    statistics = vocab_parallel_statistics(logits, target.T.contiguous(), group=tensor)
    config = InfoEntropyConfig(
        objective=objective, gamma=GAMMA, normalization=normalization, detach_weight=detach
    )
    output = pack(statistics).transpose(1, 2)
    loss, count, report, _ = training_loss(mask, output, config, Groups(context, data))
    sums = torch.stack([report[name] for name in REPORTED]).double()
    dist.all_reduce(sums, group=mpu.get_data_parallel_group(with_context_parallel=True))
    (loss / sums[0, 1]).backward()
    gradients = {name: leaf.grad for name, leaf in found.items()}
    if "shard" in gradients:
        dist.all_reduce(gradients["shard"], group=data)
    assert int(count) == mask.sum()
    positions = batch["tokens"][0].tolist() if "logits" in found else None
    return gradients | {"means": sums[:, 0] / sums[:, 1], "positions": positions}


@pytest.fixture(scope="module")
def found():
    return run_forked(losses_on_rank, RANKS)


def dense(replicas, normalization, objective, detach):
    """(means that are reported, [gradient of hidden], of weight, [of logits]) of all replicas."""
    output_weight = make_weight().requires_grad_()
    hiddens, logits, parts = [], [], []
    for index in range(replicas):
        hidden, target, mask = make_replica(index)
        hiddens.append(hidden.requires_grad_())
        logits.append(hiddens[-1] @ output_weight.T)
        logits[-1].retain_grad()
        z = logits[-1].transpose(0, 1)
        ce, entropy, _ = dense_statistics(z, target)
        weight = dense_weight(ce, entropy, objective, GAMMA, 1.0)
        weight = weight.detach() if detach else weight
        is_top = (z.argmax(-1) == target).double()
        parts.append([(mask * x).sum() for x in (weight * ce, ce, entropy, is_top, weight, 1.0)])
    *sums, count = (sum(each) for each in zip(*parts, strict=True))
    weights = torch.stack([part[4] for part in parts]).detach()  # alpha is a constant
    counts = torch.stack([part[5] for part in parts])
    alphas = {"paper": (counts / weights).mean(), "global": count / weights.sum(), "none": 1.0}
    objective = alphas[normalization] * sums[0] / count
    objective.backward()
    means = torch.stack([objective, *(each / count for each in sums[1:])]).detach()
    return means, [h.grad for h in hiddens], output_weight.grad, [z.grad for z in logits]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_gradients_and_report_equal_dense_float64(found, case, layout):
    replicas = RANKS if layout == "data" else RANKS // 2
    means, hiddens, weight, logits = dense(replicas, *case)
    for rank in range(RANKS):
        replica, part = divmod(rank, RANKS // replicas)
        mine = found[rank][layout, case]
        assert_within(mine["means"], means, rtol=1e-6)
        if layout == "sequence":
            assert_within(mine["slice"], hiddens[replica].chunk(2)[part], atol=1e-6)
            assert_within(mine["shard"], weight.chunk(2)[part], atol=1e-6)
            continue
        held = [[0, 1, 6, 7], [2, 3, 4, 5]][part] if layout == "context" else [*range(S)]
        assert mine["positions"] == held
        assert_within(mine["logits"], logits[replica][held], atol=1e-6)


COUNTS = [  # settings, all-reduces of one loss
    ({}, 1),
    ({"normalization": "none"}, 0),
    ({"normalization": "global"}, 0),
    ({"objective": "cross_entropy"}, 0),
]


def collectives_on_rank():
    """How many all-reduces a loss of every setting in COUNTS does."""
    output, mask = torch.ones(4, B, S), torch.ones(B, S)
    counted = mock.Mock(wraps=dist.all_reduce)
    counts = []
    with mock.patch.object(dist, "all_reduce", counted):
        for settings, _ in COUNTS:
            groups = Groups(None, dist.group.WORLD)
            training_loss(mask, output, InfoEntropyConfig(**settings), groups)
            counts.append(counted.call_count - sum(counts))
    return counts


def test_alpha_costs_a_collective_only_where_it_is_not_one():
    for counts in run_forked(collectives_on_rank, 2):
        assert counts == [count for _, count in COUNTS]
