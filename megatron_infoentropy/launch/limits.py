"""The numbers in a training's flags that Megatron could not start, or end, a training with.

Megatron checks some of them by assertions without a word, others by dividing by zero in a step, and
seeds only when all ranks have met. Here each is refused in a sentence before anything starts.
"""

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass

INT32, FP32 = 2**31 - 1, 3.4e38


@dataclass(frozen=True)
class FlagLimit:
    """What the numbers of some flags may be, in words and as a test."""

    words: str
    kind: type[int] | type[float]
    allows: Callable[[float], bool]


def _limits(
    flags: str, words: str, kind: type[int] | type[float], allows: Callable[[float], bool]
) -> dict[str, FlagLimit]:
    return dict.fromkeys(flags.split(), FlagLimit(words, kind, allows))


LIMITS = {
    **_limits(
        """
        num-layers hidden-size num-attention-heads num-query-groups kv-channels
        seq-length max-position-embeddings rotary-base rotary-seq-len-interpolation-factor
        make-vocab-size-divisible-by recompute-num-layers
        tensor-model-parallel-size pipeline-model-parallel-size context-parallel-size
        expert-model-parallel-size num-layers-per-virtual-pipeline-stage
        num-virtual-stages-per-pipeline-rank num-distributed-optimizer-instances
        micro-batch-size global-batch-size eval-micro-batch-size eval-global-batch-size
        train-iters lr-decay-iters log-interval log-memory-interval eval-interval save-interval
        save-retain-interval non-persistent-save-interval
        check-weight-hash-across-dp-replicas-interval num-dataset-builder-threads
        distributed-timeout-minutes distributed-timeout-seconds-after-init
        infoentropy-keep-last seed
        """,
        *(f"a whole number from 1 to {INT32}", int, lambda n: 1 <= n <= INT32),
    ),
    **_limits(
        "vocab-size padded-vocab-size ffn-hidden-size",
        *(f"a whole number from 2 to {INT32}", int, lambda n: 2 <= n <= INT32),
    ),
    **_limits(
        """
        eval-iters start-eval-at-iter lr-warmup-iters lr-wsd-decay-iters num-workers exit-interval
        exit-duration-in-mins manual-gc-interval infoentropy-histogram-interval
        """,
        *(f"a whole number from 0 to {INT32}", int, lambda n: 0 <= n <= INT32),
    ),
    **_limits(
        "train-samples lr-decay-samples",
        *("a whole number from 1 to 10^15", int, lambda n: 1 <= n <= 10**15),
    ),
    **_limits(
        "lr-warmup-samples lr-wsd-decay-samples",
        *("a whole number from 0 to 10^15", int, lambda n: 0 <= n <= 10**15),
    ),
    **_limits(
        """
        lr min-lr lr-warmup-init decoupled-lr decoupled-min-lr weight-decay start-weight-decay
        end-weight-decay clip-grad init-method-std embedding-init-method-std norm-epsilon
        """,
        *(f"a number from 0 to {FP32:g}", float, lambda x: 0 <= x <= FP32),
    ),
    **_limits(
        "adam-eps rope-scaling-factor loss-scale initial-loss-scale min-loss-scale",
        *(f"a number above 0, up to {FP32:g}", float, lambda x: 0 < x <= FP32),
    ),
    **_limits(
        "hidden-dropout attention-dropout",
        *("a number from 0 to 1", float, lambda x: 0 <= x <= 1),
    ),
    **_limits(
        "adam-beta1 adam-beta2 sgd-momentum lr-warmup-fraction",
        *("a number of at least 0 and below 1", float, lambda x: 0 <= x < 1),
    ),
    **_limits("rotary-percent", "a number above 0 and at most 1", float, lambda x: 0 < x <= 1),
}
# What a number that elsewhere means "never" was meant to say.
INSTEAD = {
    "eval-interval": "for no validation give --eval-iters 0",
    "save-interval": "to save at the end alone make it as large as train-iters",
    "log-interval": "to log at the end alone make it as large as train-iters",
    "seed": "Megatron takes no other",
}

RELATIONS: dict[str, Callable[[float, float], bool]] = {
    "must be a multiple of": lambda number, of: number % of == 0,
    "must be a multiple of 2 x": lambda number, of: number % (2 * of) == 0,
    "must be at most": lambda number, other: number <= other,
    "must be below": lambda number, other: number < other,
    "must be below 2 divided by": lambda number, other: number * other < 2,
}
UNEVEN = (
    "pipeline-model-parallel-layout decoder-first-pipeline-num-layers "
    "decoder-last-pipeline-num-layers account-for-embedding-in-pipeline-split "
    "account-for-loss-in-pipeline-split"
)
# (flag, relation, other flag): of numbers that must fit. A fourth word is a flag with which alone
# it counts; one that begins with "not " names flags with which it does not.
FITTING = (
    ("global-batch-size", "must be a multiple of", "micro-batch-size", ""),
    ("hidden-size", "must be a multiple of", "num-attention-heads", "not kv-channels"),
    ("num-attention-heads", "must be a multiple of", "num-query-groups", "group-query-attention"),
    ("num-attention-heads", "must be a multiple of", "tensor-model-parallel-size", ""),
    ("ffn-hidden-size", "must be a multiple of", "tensor-model-parallel-size", ""),
    # Megatron warms its fused SwiGLU up with half of the width.
    ("ffn-hidden-size", "must be a multiple of 2 x", "tensor-model-parallel-size", "swiglu"),
    ("num-layers", "must be a multiple of", "pipeline-model-parallel-size", f"not {UNEVEN}"),
    ("seq-length", "must be a multiple of", "tensor-model-parallel-size", "sequence-parallel"),
    ("seq-length", "must be at most", "max-position-embeddings", ""),
    ("vocab-size", "must be at most", "padded-vocab-size", ""),
    ("min-lr", "must be at most", "lr", ""),
    ("lr-warmup-init", "must be at most", "lr", ""),
    # A step multiplies weights by 1 - lr x decay.
    ("weight-decay", "must be below 2 divided by", "lr", ""),
    ("end-weight-decay", "must be below 2 divided by", "lr", ""),
    ("lr-warmup-iters", "must be below", "lr-decay-iters", ""),
    ("lr-warmup-iters", "must be below", "train-iters", "not lr-decay-iters"),
    ("lr-warmup-samples", "must be below", "lr-decay-samples", ""),
    ("lr-warmup-samples", "must be below", "train-samples", "not lr-decay-samples"),
    ("save-retain-interval", "must be a multiple of", "save-interval", ""),
    ("log-memory-interval", "must be a multiple of", "log-interval", ""),
)


def require_possible(given: Mapping[str, str]) -> None:
    """Check the numbers that flags are given, which go by name, without dashes.

    Raises:
        ValueError: one that no training can start with, or two that do not fit.
    """
    numbers = {flag: _number(flag, given[flag], LIMITS[flag]) for flag in LIMITS if flag in given}
    for flag, relation, other, when in FITTING:
        without = when.removeprefix("not ").split() if when.startswith("not ") else []
        counts = given.keys().isdisjoint(without) and (without or not when or when in given)
        both = flag in numbers and other in numbers
        if counts and both and not RELATIONS[relation](numbers[flag], numbers[other]):
            raise ValueError(f"--{flag} {given[flag]} {relation} --{other} {given[other]}")
    if given.get("position-embedding-type") == "rope" and "kv-channels" in numbers:
        rotated = int(numbers["kv-channels"] * numbers.get("rotary-percent", 1))
        if rotated + rotated % 2 > numbers["kv-channels"]:
            raise ValueError(
                f"--kv-channels {given['kv-channels']} must be even: --position-embedding-type "
                "rope turns pairs"
            )


def _number(flag: str, text: str, limit: FlagLimit) -> float:
    with suppress(ValueError):
        number = limit.kind(text)
        if limit.allows(number):
            return number
    advice = f": {INSTEAD[flag]}" if flag in INSTEAD else ""
    raise ValueError(f"--{flag} must be {limit.words}, got {text!r}{advice}")
