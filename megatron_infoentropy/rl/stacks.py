"""The log-probability and the entropy in the signatures of verl, slime, SkyRL and TRL; `use_in`.

Each function names the version and the symbol that it stands for; no code of these projects is in
here. Beside a stack's own arguments most take `vocab_size`, the true size of a padded vocabulary,
which the stacks leave in: without it so does the function. Logits are [..., V/T], this rank's shard
of the vocabulary, ids those of the whole one. Results are in nats, fp32 (fp64 for fp64 logits) and
differentiable; errors are those of `logprob_and_entropy`. A `chunk_size` is not used: the forward
pass makes nothing of the logits' size that would need chunks.
"""

import functools
import importlib
import inspect
import sys
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
import torch.distributed as dist

from megatron_infoentropy.loss import vocab_parallel_statistics
from megatron_infoentropy.loss.collective import Group
from megatron_infoentropy.rl.logprob import Pair, entropy_alone, logprob_and_entropy

# Of versions whose signatures these are.
_SERIES = {"verl": "0.9", "slime": "0.3", "skyrl": "0.4", "trl": "1.16"}
_VERL = "verl.utils.megatron.tensor_parallel:vocab_parallel_"
_VERL_ENGINE = "verl.workers.engine.megatron.transformer_impl:MegatronEngineWithLMHead"
_VERL_PROCESSOR = f"{_VERL_ENGINE}._lm_head_logits_processor"
_SKYRL = "skyrl.backends.skyrl_train.distributed.megatron.model_utils"
_TRL = "trl.trainer.utils"
# By stack: "module:attribute" -> what stands for it.
_functions: dict[str, dict[str, Callable[..., Any]]] = {stack: {} for stack in _SERIES}
_stacks_own: dict[str, Any] = {}  # "module:attribute" -> what was there before


def _stands_for[Function: Callable[..., Any]](place: str) -> Callable[[Function], Function]:
    def note(function: Function) -> Function:
        _functions[place.partition(".")[0]][place] = function
        return function

    return note


def _megatrons_group() -> Group:
    from megatron.core import parallel_state

    group: Group = parallel_state.get_tensor_model_parallel_group()
    return group


@_stands_for(f"{_VERL}entropy")
@_stands_for(f"{_SKYRL}:_VocabParallelEntropy.apply")
def verl_vocab_parallel_entropy(
    vocab_parallel_logits: torch.Tensor, *, vocab_size: int | None = None
) -> torch.Tensor:
    """Return the entropy [...], as `vocab_parallel_entropy` of verl 0.9.1 and SkyRL 0.4.0.

    In verl it is in `verl.utils.megatron.tensor_parallel`; the group is Megatron's tensor-parallel
    one. Unlike verl's, it leaves the logits as they are, in the backward pass too.
    """
    return entropy_alone(vocab_parallel_logits, _megatrons_group(), vocab_size)


@_stands_for(f"{_VERL}entropy_with_chunking")
def verl_vocab_parallel_entropy_with_chunking(
    vocab_parallel_logits: torch.Tensor, chunk_size: int = 2048, *, vocab_size: int | None = None
) -> torch.Tensor:
    """Return the entropy [...], as the function of this name beside it in verl 0.9.1."""
    return entropy_alone(vocab_parallel_logits, _megatrons_group(), vocab_size)


@_stands_for(f"{_VERL}log_probs_from_logits")
def verl_vocab_parallel_log_probs_from_logits(
    logits: torch.Tensor, labels: torch.Tensor, *, vocab_size: int | None = None
) -> torch.Tensor:
    """Return log-probabilities [...], as the function of this name beside it in verl 0.9.1.

    Unlike Megatron's cross entropy, which verl calls, it leaves fp32 logits as they are.
    """
    return logprob_and_entropy(logits, labels, group=_megatrons_group(), vocab_size=vocab_size)[0]


@_stands_for(_VERL_PROCESSOR)
def verl_lm_head_logits_processor(
    self: Any,
    logits: torch.Tensor,
    label: torch.Tensor,
    temperature: torch.Tensor,
    *,
    calculate_sum_pi_squared: bool,
    calculate_entropy: bool,
    distillation_use_topk: bool,
    distillation_only: bool,
    logits_processor_func: Callable[..., Any],
    batch: Any,
    data_format: str,
    vocab_size: int | None = None,
) -> dict[str, torch.Tensor]:
    """Return {"log_probs": [b, s]} and maybe "entropy" and "sum_pi_squared" of logits [b, s, V/T].

    As `_lm_head_logits_processor` of verl 0.9.1's `MegatronEngineWithLMHead`, but by one read and
    one collective, without a clone of the logits, and with the gradient written over them. They are
    divided by `temperature` [b, s] as they are read, which rounds nothing to 16 bits; what is not
    positive there is padding. Distillation goes to verl's own method.

    Raises:
        RuntimeError: verl's own method is needed, and `use_in("verl")` was not called.
    """
    if distillation_use_topk or distillation_only:
        if _VERL_PROCESSOR not in _stacks_own:
            raise RuntimeError(
                f'verl\'s own {_VERL_PROCESSOR} is needed: call use_in("verl") first'
            )
        own: dict[str, torch.Tensor] = _stacks_own[_VERL_PROCESSOR](
            *(self, logits, label, temperature),
            calculate_sum_pi_squared=calculate_sum_pi_squared,
            calculate_entropy=calculate_entropy,
            distillation_use_topk=distillation_use_topk,
            distillation_only=distillation_only,
            logits_processor_func=logits_processor_func,
            batch=batch,
            data_format=data_format,
        )
        return own
    statistics = vocab_parallel_statistics(
        logits,
        label,
        group=_megatrons_group(),
        vocab_size=vocab_size,
        temperature=temperature.masked_fill(temperature <= 0, 1e-8),
        sum_p_squared=calculate_sum_pi_squared,
        inplace_backward=True,
    )
    results = {"log_probs": -statistics.cross_entropy}
    if calculate_entropy:
        results["entropy"] = statistics.entropy
    if statistics.sum_p_squared is not None:
        results["sum_pi_squared"] = statistics.sum_p_squared
    return results


@_stands_for("slime.utils.ppo_utils:calculate_log_probs_and_entropy")
def slime_calculate_log_probs_and_entropy(
    logits: torch.Tensor,
    tokens: torch.Tensor,
    tp_group: Group | None,
    with_entropy: bool = False,
    chunk_size: int = -1,
    log_prob_keep_mask: torch.Tensor | None = None,
    with_entropy_grad: bool = True,
    *,
    vocab_size: int | None = None,
) -> Pair:
    """Return (log-probabilities [N, 1], entropy [N] or None) of logits [N, V/T].

    As `slime.utils.ppo_utils.calculate_log_probs_and_entropy` of slime 0.3.1. `log_prob_keep_mask`
    is the `keep_mask` of `logprob_and_entropy`. Without a group it is the default one, as in slime.
    """
    if not len(logits):
        return logits.new_zeros(0), logits.new_zeros(0) if with_entropy else None
    if tp_group is None and dist.is_initialized():
        tp_group = dist.group.WORLD
    log_prob, entropy = logprob_and_entropy(
        logits,
        tokens,
        group=tp_group,
        vocab_size=vocab_size,
        keep_mask=log_prob_keep_mask,
        with_entropy=with_entropy,
        entropy_gradient=with_entropy_grad,
    )
    return log_prob.unsqueeze(-1), entropy


@_stands_for(f"{_SKYRL}:DistributedLogprob.apply")
def skyrl_distributed_logprob(
    vocab_parallel_logits: torch.Tensor,
    target: torch.Tensor,
    vocab_start_index: int,
    vocab_end_index: int,
    group: Group,
    inference_only: bool = False,
    *,
    vocab_size: int | None = None,
) -> torch.Tensor:
    """Return log-probabilities [b, s], as `DistributedLogprob.apply` of SkyRL 0.4.0.

    It is in `skyrl.backends.skyrl_train.distributed.megatron.model_utils`, where all functions from
    logits to log-probabilities call it, also for packed and split sequences. Shards must be of one
    width, in rank order.
    """
    expected = group.rank() * vocab_parallel_logits.shape[-1]
    if vocab_start_index != expected:
        raise ValueError(
            f"expected shards of one width in rank order, so that this one starts at {expected}, "
            f"got vocab_start_index={vocab_start_index}"
        )
    logprob, _ = logprob_and_entropy(
        vocab_parallel_logits, target, group=group, vocab_size=vocab_size, with_entropy=False
    )
    return logprob.detach() if inference_only else logprob


@_stands_for(f"{_SKYRL}:ChunkedDistributedLogprob.apply")
def skyrl_chunked_distributed_logprob(
    vocab_parallel_logits: torch.Tensor,
    target: torch.Tensor,
    vocab_start_index: int,
    vocab_end_index: int,
    chunk_size: int,
    tp_group: Group,
    inference_only: bool = False,
    *,
    vocab_size: int | None = None,
) -> torch.Tensor:
    """Return log-probabilities [b, s], as `ChunkedDistributedLogprob.apply` beside it."""
    places = (vocab_start_index, vocab_end_index)
    return skyrl_distributed_logprob(
        vocab_parallel_logits, target, *places, tp_group, inference_only, vocab_size=vocab_size
    )


@_stands_for(f"{_TRL}:selective_log_softmax")
def trl_selective_log_softmax(
    logits: torch.Tensor,
    index: torch.Tensor,
    temperature: float = 1.0,
    row_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return log-probabilities in the shape of `index`, [...] or [..., K], of logits [..., V].

    As `trl.trainer.utils.selective_log_softmax` of TRL 1.16.0, which on a CPU returns the logits'
    dtype. They are 0 where `row_mask`, in the shape of `index`, is.
    """
    if index.dim() < logits.dim():
        return logprob_and_entropy(
            logits, index, temperature=temperature, loss_mask=row_mask, with_entropy=False
        )[0]
    top = logits.detach().argmax(-1, keepdim=True)
    of_top, _ = logprob_and_entropy(
        logits, top.squeeze(-1), temperature=temperature, with_entropy=False
    )
    # Relative to the largest logit nothing cancels: both terms are at most 0.
    below = logits.gather(-1, index).to(of_top) - logits.gather(-1, top).to(of_top)
    logprob = below / temperature + of_top.unsqueeze(-1)
    return logprob if row_mask is None else logprob.masked_fill(row_mask == 0, 0)


@_stands_for(f"{_TRL}:entropy_from_logits")
def trl_entropy_from_logits(logits: torch.Tensor, chunk_size: int = 128) -> torch.Tensor:
    """Return the entropy [...], as `trl.trainer.utils.entropy_from_logits` of TRL 1.16.0."""
    return entropy_alone(logits, None, None)


@_stands_for(f"{_TRL}:selective_log_softmax_and_entropy")
def trl_selective_log_softmax_and_entropy(
    logits: torch.Tensor,
    index: torch.Tensor,
    entropy_requires_grad: bool = True,
    temperature: float = 1.0,
    row_mask: torch.Tensor | None = None,
) -> Pair:
    """Return both, [...] each, as the function of this name in TRL 1.16.0's `trainer.utils`."""
    return logprob_and_entropy(
        logits,
        index,
        temperature=temperature,
        loss_mask=row_mask,
        entropy_gradient=entropy_requires_grad,
    )


def use_in(stack: str, *, vocab_size: int | None = None) -> list[str]:
    """Put the functions of this module in the place of a stack's own, in this process.

    Args:
        stack: "verl", "slime", "skyrl" or "trl".
        vocab_size: true vocabulary size where the stack's model pads it, which none of the stacks
            tells its own functions; not for TRL, whose models are not padded.

    Returns:
        The places that were taken, as "module:attribute".

    Raises:
        ValueError: a stack that is not known, or a vocabulary size for TRL.
        RuntimeError: the stack is not installed, or in another version, or with other signatures.
            Nothing is replaced then.
    """
    if stack not in _SERIES:
        raise ValueError(f"expected a stack among {', '.join(_SERIES)}, got {stack!r}")
    if stack == "trl" and vocab_size is not None:
        raise ValueError("TRL's logits are the whole vocabulary: vocab_size is not for it")
    _require_version(stack)
    functions = _functions[stack]
    owners = {place: _owner_of(stack, place) for place in functions}
    for place, (owner, name) in owners.items():
        _require_signature(stack, place, owner, name)
    for place, (owner, name) in owners.items():
        _stacks_own.setdefault(place, getattr(owner, name))
        _replace(stack, owner, name, _with_vocabulary(functions[place], vocab_size))
    return list(functions)


def _require_version(stack: str) -> None:
    series = _SERIES[stack]
    try:
        installed = version(stack)
    except PackageNotFoundError:
        raise RuntimeError(
            f"{stack} is not installed in this environment; install {stack} {series}"
        ) from None
    if not f"{installed}.".startswith(f"{series}."):
        raise RuntimeError(
            f"expected {stack} {series}, whose functions were replaced and tested, got "
            f"{installed}: install {stack} {series}, or call the functions of "
            "megatron_infoentropy.rl in your own code"
        )


def _owner_of(stack: str, place: str) -> tuple[Any, str]:
    """Return the module or class that holds what a place names, and the name in it."""
    module, _, path = place.partition(":")
    *classes, name = path.split(".")
    try:
        owner = functools.reduce(getattr, classes, importlib.import_module(module))
        getattr(owner, name)
    except (ImportError, AttributeError) as error:
        raise RuntimeError(
            f"{stack} {version(stack)} has no {place} that can be imported here ({error}); "
            "nothing was replaced"
        ) from error
    return owner, name


def _require_signature(stack: str, place: str, owner: Any, name: str) -> None:
    is_autograd = name == "apply"  # whose own signature is (*args); the first of forward is ctx
    theirs = _parameters(owner.forward)[1:] if is_autograd else _parameters(getattr(owner, name))
    ours = _parameters(_functions[stack][place])
    if theirs != ours:
        raise RuntimeError(
            f"expected {place} of {stack} {version(stack)} to take "
            f"({', '.join(name for name, *_ in ours)}), as in {stack} {_SERIES[stack]}, got "
            f"({', '.join(name for name, *_ in theirs)}), or other defaults; nothing was replaced"
        )


def _parameters(function: Callable[..., Any]) -> list[tuple[str, object, object]]:
    listed = inspect.signature(function).parameters.values()
    return [(p.name, p.kind, p.default) for p in listed if p.name != "vocab_size"]


def _with_vocabulary(function: Callable[..., Any], vocab_size: int | None) -> Callable[..., Any]:
    if vocab_size is None:
        return function

    @functools.wraps(function)
    def call(*args: Any, **options: Any) -> Any:
        return function(*args, **options, vocab_size=vocab_size)

    return call


def _replace(stack: str, owner: Any, name: str, function: Callable[..., Any]) -> None:
    if inspect.isclass(owner):
        setattr(owner, name, staticmethod(function) if name == "apply" else function)
        return
    before = getattr(owner, name)
    for path, module in list(sys.modules.items()):  # those that imported it by name hold it too
        if path.partition(".")[0] == stack:
            for held in [key for key, value in vars(module).items() if value is before]:
                setattr(module, held, function)
