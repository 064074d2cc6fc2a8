"""The arguments of the public functions, checked and laid out as rows for the kernels."""

import operator
import sys
from typing import Any, NamedTuple, get_args

import torch
import torch.distributed as dist

from megatron_infoentropy import kernels
from megatron_infoentropy.config import Backend, Collective, InfoEntropyConfig
from megatron_infoentropy.kernels import ops
from megatron_infoentropy.kernels.contract import Options, Shard
from megatron_infoentropy.kernels.ops import ShardKernels
from megatron_infoentropy.loss.collective import Group, warn_of_gathered, world_and_rank

COLLECTIVES = get_args(Collective)
LARGEST = 2.0**126  # softcap or temperature; fp32 has its reciprocal too


class Vocabulary(NamedTuple):
    """How `size` entries lie over the ranks of a tensor-parallel group."""

    size: int
    shard: Shard  # of this rank
    columns: tuple[int, ...]  # that take part, of every rank's shard


class Cut(NamedTuple):
    """The tokens in chunks of one size, the last perhaps shorter.

    With sequence parallelism a chunk is the same rows of every rank's slice, in rank order. So it
    is gathered, and its gradient scattered, chunk by chunk: no rank ever holds the hidden states,
    or their gradient, of all tokens.
    """

    slices: int  # ranks that hold a slice of the tokens; 1 without sequence parallelism
    rows: int  # L, of one slice
    chunk_rows: int  # of one slice

    @property
    def tokens(self) -> int:
        """Return the largest chunk's number of tokens."""
        return self.slices * self.chunk_rows

    def chunks(self) -> list[slice]:
        """Rows of a slice, chunk by chunk."""
        step = max(1, self.chunk_rows)
        return [slice(start, min(start + step, self.rows)) for start in range(0, self.rows, step)]

    def take[Given: (torch.Tensor, torch.Tensor | None)](self, whole: Given, rows: slice) -> Given:
        """[..., C] of [..., N], contiguous; None of None."""
        if whole is None:
            return None
        part = self._by_slice(whole)[..., rows]
        return part.reshape(*whole.shape[:-1], -1).contiguous()

    def put(self, whole: torch.Tensor, rows: slice, part: torch.Tensor) -> None:
        """Write [..., C] to its place in [..., N]."""
        place = self._by_slice(whole)[..., rows]
        place.copy_(part.view(place.shape))

    def _by_slice(self, whole: torch.Tensor) -> torch.Tensor:
        return whole.view(*whole.shape[:-1], self.slices, self.rows)


def cut_tokens(rows: int, slices: int, chunk_tokens: int) -> Cut:
    """Chunks of at most `chunk_tokens` tokens, of nearly equal size: a chunk of one token would
    cost a pass over the whole weight.

    Raises:
        ValueError: chunk_tokens below 1.
    """
    if chunk_tokens < 1:
        raise ValueError(f"chunk_tokens must be at least 1, got {chunk_tokens}; 4096 is usual")
    count = -(-rows // max(1, chunk_tokens // slices))
    return Cut(slices, rows, -(-rows // count) if count else 0)


class Rows(NamedTuple):
    """Logits and targets as the kernels take them."""

    logits_NV: torch.Tensor
    target_N: torch.Tensor
    order: list[int]  # leading dimensions of the logits, outermost in memory first

    def flatten(self, values: torch.Tensor) -> torch.Tensor:
        """[N] of [...] in the target's shape, in the order of the rows, contiguous."""
        return values.permute(self.order).reshape(-1).contiguous()

    def restore(self, result_N: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """A result of every row in the target's own shape."""
        inverse = [self.order.index(axis) for axis in range(len(self.order))]
        return result_N.view([target.shape[axis] for axis in self.order]).permute(inverse)


def as_rows(logits: torch.Tensor, target: torch.Tensor) -> Rows:
    """In memory order, so that [s, b, V] logits transposed to [b, s, V] stay where they are."""
    strides, order = logits.stride(), list(range(logits.dim() - 1))
    if not logits.is_contiguous():  # torch 2.11 does not compile a sort by strides it does not know
        order.sort(key=lambda axis: -strides[axis])
    rows_NV = logits.permute(*order, logits.dim() - 1).reshape(-1, logits.shape[-1])
    overlapping = rows_NV.shape[0] > 1 and rows_NV.stride(0) < rows_NV.shape[-1]
    if rows_NV.stride(-1) != 1 or overlapping:  # expanded logits, for one
        rows_NV = rows_NV.contiguous()
    return Rows(rows_NV, as_ids(target).permute(order).reshape(-1).contiguous(), order)


def as_ids(target: torch.Tensor) -> torch.Tensor:
    """Return targets as int64, before anything else is done to them: -100 is 156 in uint8.

    Raises:
        ValueError: targets that are not integers.
    """
    if target.is_floating_point() or target.is_complex() or target.dtype == torch.bool:
        raise ValueError(f"expected integer targets, got {target.dtype}")
    return target.long()


def local_shard(tensor: torch.Tensor, dim: int, group: Group | None) -> torch.Tensor:
    """Return this rank's shard of a DTensor that is sharded evenly along `dim` over `group` alone.

    Any other tensor is returned as it is, for `check_tensors` to judge.
    """
    if not ops.is_subclass_with_own_dispatch(tensor):
        return tensor
    module = sys.modules.get("torch.distributed.tensor")  # there, if this is a DTensor
    if module is None or group is None or not isinstance(tensor, module.DTensor):
        return tensor
    sharded: Any = tensor
    is_shard = (
        sharded.device_mesh.ndim == 1
        and sharded.placements == (module.Shard(dim % tensor.dim()),)
        and tensor.shape[dim] % group.size() == 0
        and dist.get_process_group_ranks(sharded.device_mesh.get_group())
        == dist.get_process_group_ranks(group)
    )
    local: torch.Tensor = sharded.to_local() if is_shard else tensor
    return local


def split_vocabulary(
    vocab_size: int | None, width: int, group: Group | None, ignore_index: int
) -> Vocabulary:
    """The vocabulary over `group`, `width` columns a rank; the last ranks may hold padding.

    Raises:
        ValueError: more entries than columns.
    """
    world, rank = world_and_rank(group)
    # Burnt into a compiled graph: torch fails where a backward pass reckons with an unknown one.
    width = operator.index(width)
    size = width * world if vocab_size is None else vocab_size
    if not 0 < size <= width * world:
        raise ValueError(
            f"vocab_size={vocab_size} does not fit: {world} shard(s) of {width} columns hold "
            f"{width * world} entries; is every rank of the group given its own shard?"
        )
    compiling = torch.compiler.is_compiling()
    if world > 1 and vocab_size is not None and width >= vocab_size and not compiling:
        warn_of_gathered(
            f"each of {world} ranks holds {width} columns, as many as the {vocab_size} entries of "
            "the whole vocabulary",
            world,
        )
    columns = tuple(min(max(size - r * width, 0), width) for r in range(world))
    return Vocabulary(size, Shard(rank * width, columns[rank], ignore_index), columns)


def inverse_temperature(
    temperature: float | torch.Tensor, target: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor | None:
    """Return 1 / temperature in the target's shape, a constant; None where all have the same.

    Raises:
        ValueError: another shape than the target's, or on a CPU a value that is not positive.
    """
    if not isinstance(temperature, torch.Tensor):
        return None
    check_tensors(target=target, temperature=temperature)
    if temperature.shape != target.shape:
        raise ValueError(
            f"expected one temperature or one a token, in the target's shape {list(target.shape)}, "
            f"got {list(temperature.shape)}"
        )
    inverse = temperature.detach().to(dtype).reciprocal()
    is_wrong = ~((temperature > 0) & inverse.isfinite() & (inverse > 0))
    if not torch.compiler.is_compiling() and temperature.device.type == "cpu" and is_wrong.any():
        wrong = float(temperature[is_wrong][0])
        raise ValueError(f"temperatures must be positive, got {wrong} for some token")
    return inverse.masked_fill(is_wrong, torch.nan)


class StatisticsArguments(NamedTuple):
    """The arguments of `vocab_parallel_statistics` that its fused form takes too."""

    group: Group | None
    vocab_size: int | None
    ignore_index: int
    softcap: float | None
    temperature: float | torch.Tensor
    uniform_cross_entropy: bool
    sum_p_squared: bool
    backend: Backend
    collective: Collective


def arguments_of(
    config: InfoEntropyConfig,
    *,
    group: Group | None,
    vocab_size: int | None,
    ignore_index: int,
) -> StatisticsArguments:
    """Return what a configuration asks of the statistics."""
    config.require_no_trainer()
    return StatisticsArguments(
        group,
        vocab_size,
        ignore_index,
        softcap=config.softcap or None,
        temperature=config.temperature,
        uniform_cross_entropy=config.label_smoothing > 0,
        sum_p_squared=config.needs_sum_p_squared,
        backend=config.backend,
        collective=config.collective,
    )


class Settings(NamedTuple):
    """Everything but tensors that the autograd functions need, checked."""

    vocabulary: Vocabulary
    options: Options
    group: Group | None
    kernels: ShardKernels
    collective: Collective
    inplace_backward: bool = False  # over the logits
    cut: Cut = Cut(1, 0, 0)  # of the fused output layer, as is what follows
    into_main_grad: bool = False

    def main_grad_of(self, weight_VH: torch.Tensor) -> torch.Tensor | None:
        """Return where a data-parallel wrapper keeps the weight's gradient, if it is asked for."""
        return getattr(weight_VH, "main_grad", None) if self.into_main_grad else None


def make_settings(
    x: torch.Tensor, width: int, arguments: StatisticsArguments, **more: Any
) -> Settings:
    """Return the settings for logits of the dtype and device of `x`, `width` columns a rank.

    more: the fields of `Settings` that have defaults. Of a temperature for each token see
    `inverse_temperature`.

    Raises:
        ValueError: sizes or options that cannot be.
        RuntimeError: the named backend cannot run on such logits.
    """
    group, softcap, temperature = arguments.group, arguments.softcap, arguments.temperature
    if softcap is not None and not 1 / LARGEST <= softcap <= LARGEST:
        raise ValueError(f"softcap must be positive and finite, or None for none, got {softcap}")
    same = 1.0 if isinstance(temperature, torch.Tensor) else float(temperature)
    if not 1 / LARGEST <= same <= LARGEST:
        raise ValueError(f"temperature must be positive and finite, got {temperature}")
    if arguments.collective not in COLLECTIVES:
        names = " or ".join(map(repr, COLLECTIVES))
        raise ValueError(f"collective must be {names}, got {arguments.collective!r}")
    asked = arguments.uniform_cross_entropy, arguments.sum_p_squared
    options = Options(float(softcap or 0), same, *asked)
    vocabulary = split_vocabulary(arguments.vocab_size, width, group, arguments.ignore_index)
    chosen = kernels.select(arguments.backend, x.device, x.dtype)
    bound = ShardKernels(chosen, vocabulary.shard, options)
    return Settings(vocabulary, options, group, bound, arguments.collective, **more)


def check_logits(logits: torch.Tensor, target: torch.Tensor, inplace_backward: bool) -> None:
    """Raise ValueError where tensors do not fit, or the caller's own is at risk."""
    check_tensors(logits=logits, target=target)
    if logits.dim() < 2 or target.shape != logits.shape[:-1]:
        raise ValueError(
            "expected logits [..., V] and target [...] with the same leading dimensions, got "
            f"{list(logits.shape)} and {list(target.shape)}; Megatron's output layer gives "
            "[sequence, batch, V] while its labels are [batch, sequence]: transpose one of them"
        )
    if logits.shape[-1] == 0:
        raise ValueError(
            f"expected logits with at least one column, got {list(logits.shape)}: a shard that is "
            "all padding still has its columns; say how many count by vocab_size"
        )
    if not logits.is_floating_point():
        raise ValueError(f"expected floating-point logits, got {logits.dtype}")
    if inplace_backward and not torch.compiler.is_compiling() and _lie_in_a_leaf(logits):
        raise ValueError(
            "inplace_backward=True would replace your own tensor by its gradient: it is for logits "
            "that a model computed, not for a leaf or a view of one; pass inplace_backward=False"
        )


def _lie_in_a_leaf(logits: torch.Tensor) -> bool:
    """Return whether the memory of these logits is that of a leaf that requires a gradient.

    A leaf may itself be a view of a tensor that requires none, which is then the base of its views:
    so the chain of operations with one input, as views are, is followed to its start.
    """
    if not logits.requires_grad:
        return False
    owner = logits if logits._base is None else logits._base
    if logits.is_leaf or (owner.is_leaf and owner.requires_grad):
        return True
    nodes: list[Any] = [logits.grad_fn]
    while len(nodes) == 1:
        if nodes[0].name() == "torch::autograd::AccumulateGrad":
            leaf = nodes[0].variable
            return ops.is_subclass_with_own_dispatch(leaf) or (
                leaf.untyped_storage().data_ptr() == logits.untyped_storage().data_ptr()
            )
        nodes = [node for node, _ in nodes[0].next_functions if node is not None]
    return False


def check_tensors(**tensors: torch.Tensor | None) -> None:
    """Raise ValueError where tensors are not plain ones, or lie apart: kernels get addresses."""
    given = {name: x for name, x in tensors.items() if x is not None}
    ops.require_plain(**given)
    if len({x.device for x in given.values()}) > 1:
        where = ", ".join(f"{name} on {x.device}" for name, x in given.items())
        raise ValueError(f"expected all tensors on one device, got {where}; move them with .to()")


def leave_out_masked(
    target: torch.Tensor, loss_mask: torch.Tensor | None, ignore_index: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """(target, mask), masked tokens ignored rather than multiplied by 0: 0 * NaN would be NaN.

    Raises:
        ValueError: targets that are not integers; a mask of another shape or on another device.
    """
    check_tensors(target=target, loss_mask=loss_mask)
    target = as_ids(target)
    if loss_mask is None:
        return target, (target != ignore_index).to(dtype)
    if loss_mask.shape != target.shape:
        raise ValueError(
            f"loss_mask must have the target's shape {list(target.shape)}, got "
            f"{list(loss_mask.shape)}"
        )
    target = target.masked_fill(loss_mask == 0, ignore_index)
    return target, (target != ignore_index).to(dtype) * loss_mask.to(dtype)


def check_targets(target_N: torch.Tensor, vocabulary: int, ignore_index: int) -> None:
    """Raises ValueError for a target outside the vocabulary, where a look at it costs no stall."""
    if torch.compiler.is_compiling() or target_N.device.type != "cpu" or target_N.numel() == 0:
        return
    wrong = ((target_N < 0) | (target_N >= vocabulary)) & (target_N != ignore_index)
    if wrong.any():
        index = int(wrong.nonzero()[0])
        raise ValueError(
            f"{int(wrong.sum())} target(s) lie outside the vocabulary of {vocabulary} entries, the "
            f"first is {int(target_N[index])}; to leave tokens out use ignore_index "
            f"({ignore_index})"
        )
