"""Sequence and context parallel at the loss, with Megatron's own ways to split and gather.

Their trainers need norms and attention of Transformer Engine; what the loss does there is tested
here, in float64, on four gloo ranks:

    sequence parallel: ranks of a tensor-parallel group hold slices of the sequence, Megatron's
        output layer gathers them, and each gets back the gradient of its slice;
    context parallel: a rank holds the first and the last of 2 CP chunks (rank 1 the second and last
        but one), and alpha is one number per micro-batch of a data-parallel replica.
"""

import pytest
import torch
import torch.distributed as dist
from close import assert_within
from launch import run_trainer
from oracle import dense_objective

S, B, H, V, RANKS = 8, 2, 6, 24, 4
GAMMA = 2.0
NORMALIZATIONS = ("paper", "global")


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


def losses_of(logits, target, mask, normalization, *, tensor_group, groups):
    """(loss, its divisor) as the trainer has them, of logits [s, b, V / TP]."""
    from megatron_infoentropy import InfoEntropyConfig
    from megatron_infoentropy.integration.output import pack
    from megatron_infoentropy.integration.step import training_loss
    from megatron_infoentropy.loss.statistics import vocab_parallel_statistics

    statistics = vocab_parallel_statistics(logits, target.T.contiguous(), group=tensor_group)
    output = pack(statistics).transpose(1, 2)
    config = InfoEntropyConfig(gamma=GAMMA, normalization=normalization)
    loss, _, report, _ = training_loss(mask, output, config, groups)
    return loss, report["objective"][1]


def on_rank(folder):
    """Write {(how it is split, normalization): this rank's gradients}."""
    from megatron.core import parallel_state as mpu

    dist.init_process_group("gloo")
    found = {}
    mpu.initialize_model_parallel(tensor_model_parallel_size=2)
    for normalization in NORMALIZATIONS:
        found["sequence", normalization] = sequence_parallel(normalization, mpu)
    mpu.destroy_model_parallel()
    mpu.initialize_model_parallel(context_parallel_size=2)
    for normalization in NORMALIZATIONS:
        found["context", normalization] = context_parallel(normalization, mpu)
    torch.save(found, folder / f"{dist.get_rank()}.pt")


def sequence_parallel(normalization, mpu):
    """{"hidden": of this rank's slice, "weight": of its shard}, summed over replicas."""
    from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region

    from megatron_infoentropy.integration.step import Groups

    tensor_group, data = mpu.get_tensor_model_parallel_group(), mpu.get_data_parallel_group()
    hidden, target, mask = make_replica(data.rank())
    part = hidden.chunk(2)[tensor_group.rank()].clone().requires_grad_()
    weight = make_weight().chunk(2)[tensor_group.rank()].clone().requires_grad_()
    whole = gather_from_sequence_parallel_region(part, group=tensor_group)
    groups = Groups(None, data)
    loss, divisor = losses_of(
        whole @ weight.T, target, mask, normalization, tensor_group=tensor_group, groups=groups
    )
    dist.all_reduce(divisor, group=data)
    (loss / divisor).backward()
    dist.all_reduce(weight.grad, group=data)
    return {"hidden": part.grad, "weight": weight.grad}


def context_parallel(normalization, mpu):
    """{"logits": of the positions that this rank holds, "positions": which}."""
    from megatron.core.utils import get_batch_on_this_cp_rank

    from megatron_infoentropy.integration.step import Groups

    context, data = mpu.get_context_parallel_group(), mpu.get_data_parallel_group()
    hidden, target, mask = make_replica(data.rank())
    whole = {
        "tokens": torch.arange(S).expand(B, S).contiguous(),
        "labels": target,
        "loss_mask": mask,
        "logits": (hidden @ make_weight().T).transpose(0, 1).contiguous(),
    }
    part = get_batch_on_this_cp_rank(whole, is_hybrid_cp=False, cp_group=context)
    logits = part["logits"].transpose(0, 1).contiguous().requires_grad_()
    groups = Groups(context, data)
    loss, divisor = losses_of(
        logits, part["labels"], part["loss_mask"], normalization, tensor_group=None, groups=groups
    )
    dist.all_reduce(divisor)
    (loss / divisor).backward()
    return {"logits": logits.grad, "positions": part["tokens"][0]}


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("split")
    run_trainer(RANKS, on_rank, (folder,), [], folder)
    return [torch.load(folder / f"{rank}.pt") for rank in range(RANKS)]


def dense(normalization):
    """([gradient of hidden], gradient of weight, [gradient of logits]) of both replicas."""
    weight = make_weight().requires_grad_()
    hiddens, logits, batches = [], [], []
    for index in range(2):
        hidden, target, mask = make_replica(index)
        hiddens.append(hidden.requires_grad_())
        logits.append(hiddens[-1] @ weight.T)
        logits[-1].retain_grad()
        batches.append((logits[-1].transpose(0, 1), target, mask))
    dense_objective(batches, gamma=GAMMA, normalization=normalization).backward()
    return [h.grad for h in hiddens], weight.grad, [z.grad for z in logits]


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_gradients_of_sequence_slices_equal_the_dense_ones(found, normalization):
    hidden, weight, _ = dense(normalization)
    for rank in range(RANKS):
        replica, shard = divmod(rank, 2)
        mine = found[rank]["sequence", normalization]
        assert_within(mine["hidden"], hidden[replica].chunk(2)[shard], atol=1e-6)
        assert_within(mine["weight"], weight.chunk(2)[shard], atol=1e-6)


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_gradients_of_context_chunks_equal_the_dense_ones(found, normalization):
    *_, logits = dense(normalization)
    for rank in range(RANKS):
        replica, context = divmod(rank, 2)
        mine = found[rank]["context", normalization]
        assert mine["positions"].tolist() == [[0, 1, 6, 7], [2, 3, 4, 5]][context]
        assert_within(mine["logits"], logits[replica][mine["positions"]], atol=1e-6)
