"""The numbers in a training's flags that Megatron could not start, or end, a training with.

Megatron checks some of them by assertions without a word, others by dividing by zero in a step, and
seeds only when all ranks have met. Here each is refused in a sentence before anything starts.
"""

import operator
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass

INT32, FP32 = 2**31 - 1, 3.4e38


@dataclass(frozen=True)
class Limit:
    """Numbers of one kind: what they may be, in words and as a test, and the flags they are of."""

    words: str
    kind: type[int] | type[float]
    allows: Callable[[float], bool]
    flags: str  # with white space between


LIMITS = (
    Limit(
        f"a whole number from 1 to {INT32}",
        int,
        lambda n: 1 <= n <= INT32,
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
    ),
    Limit(
        f"a whole number from 2 to {INT32}",
        int,
        lambda n: 2 <= n <= INT32,
        "vocab-size padded-vocab-size ffn-hidden-size",
    ),
    Limit(
        f"a whole number from 0 to {INT32}",
        int,
        lambda n: 0 <= n <= INT32,
        """
        eval-iters start-eval-at-iter lr-warmup-iters lr-wsd-decay-iters num-workers exit-interval
        exit-duration-in-mins manual-gc-interval infoentropy-histogram-interval
        """,
    ),
    Limit(
        "a whole number from 1 to 10^15",
        int,
        lambda n: 1 <= n <= 10**15,
        "train-samples lr-decay-samples",
    ),
    Limit(
        "a whole number from 0 to 10^15",
        int,
        lambda n: 0 <= n <= 10**15,
        "lr-warmup-samples lr-wsd-decay-samples",
    ),
    Limit(
        f"a number from 0 to {FP32:g}",
        float,
        lambda x: 0 <= x <= FP32,
        """
        lr min-lr lr-warmup-init decoupled-lr decoupled-min-lr weight-decay start-weight-decay
        end-weight-decay clip-grad init-method-std embedding-init-method-std norm-epsilon
        """,
    ),
    Limit(
        f"a number above 0, up to {FP32:g}",
        float,
        lambda x: 0 < x <= FP32,
        "adam-eps rope-scaling-factor loss-scale initial-loss-scale min-loss-scale",
    ),
    Limit(
        "a number from 0 to 1",
        float,
        lambda x: 0 <= x <= 1,
        "hidden-dropout attention-dropout",
    ),
    Limit(
        "a number of at least 0 and below 1",
        float,
        lambda x: 0 <= x < 1,
        "adam-beta1 adam-beta2 sgd-momentum lr-warmup-fraction",
    ),
    Limit("a number above 0 and at most 1", float, lambda x: 0 < x <= 1, "rotary-percent"),
)
# What a number that elsewhere means "never" was meant to say.
INSTEAD = {
    "eval-interval": "for no validation give --eval-iters 0",
    "save-interval": "to save at the end alone make it as large as train-iters",
    "log-interval": "to log at the end alone make it as large as train-iters",
    "seed": "Megatron takes no other",
}


@dataclass(frozen=True)
class Relation:
    """Two flags whose numbers must fit; it counts where `given` is given and none of `without`."""

    flag: str
    other: str
    words: str
    holds: Callable[[float, float], bool]
    given: str = ""
    without: tuple[str, ...] = ()


def _is_multiple(number: float, of: float) -> bool:
    return number % of == 0


TENSOR, PIPELINE = "tensor-model-parallel-size", "pipeline-model-parallel-size"
A_MULTIPLE, AT_MOST, BELOW = "must be a multiple of", "must be at most", "must be below"
UNEVEN = (
    *("pipeline-model-parallel-layout", "decoder-first-pipeline-num-layers"),
    *("decoder-last-pipeline-num-layers", "account-for-embedding-in-pipeline-split"),
    "account-for-loss-in-pipeline-split",
)
RELATIONS = (
    Relation("global-batch-size", "micro-batch-size", A_MULTIPLE, _is_multiple),
    Relation(
        "hidden-size", "num-attention-heads", A_MULTIPLE, _is_multiple, without=("kv-channels",)
    ),
    Relation(
        *("num-attention-heads", "num-query-groups", A_MULTIPLE, _is_multiple),
        given="group-query-attention",
    ),
    Relation("num-attention-heads", TENSOR, A_MULTIPLE, _is_multiple),
    Relation("ffn-hidden-size", TENSOR, A_MULTIPLE, _is_multiple),
    # Megatron warms its fused SwiGLU up with half of the width.
    Relation(
        *(
            "ffn-hidden-size",
            TENSOR,
            f"{A_MULTIPLE} 2 x",
            lambda width, ranks: not width % (2 * ranks),
        ),
        given="swiglu",
    ),
    Relation("num-layers", PIPELINE, A_MULTIPLE, _is_multiple, without=UNEVEN),
    Relation("seq-length", TENSOR, A_MULTIPLE, _is_multiple, given="sequence-parallel"),
    Relation("seq-length", "max-position-embeddings", AT_MOST, operator.le),
    Relation("vocab-size", "padded-vocab-size", AT_MOST, operator.le),
    Relation("min-lr", "lr", AT_MOST, operator.le),
    Relation("lr-warmup-init", "lr", AT_MOST, operator.le),
    # A step multiplies weights by 1 - lr x decay.
    *(
        Relation(decay, "lr", f"{BELOW} 2 divided by", lambda decay, lr: decay * lr < 2)
        for decay in ("weight-decay", "end-weight-decay")
    ),
    Relation("lr-warmup-iters", "lr-decay-iters", BELOW, operator.lt),
    Relation("lr-warmup-iters", "train-iters", BELOW, operator.lt, without=("lr-decay-iters",)),
    Relation("lr-warmup-samples", "lr-decay-samples", BELOW, operator.lt),
    Relation(
        "lr-warmup-samples", "train-samples", BELOW, operator.lt, without=("lr-decay-samples",)
    ),
    Relation("save-retain-interval", "save-interval", A_MULTIPLE, _is_multiple),
    Relation("log-memory-interval", "log-interval", A_MULTIPLE, _is_multiple),
)


def require_possible(given: Mapping[str, str]) -> None:
    """Check the numbers that flags are given, which go by name, without dashes.

    Raises:
        ValueError: one that no training can start with, or two that do not fit.
    """
    numbers = {
        flag: _number(flag, given[flag], limit)
        for limit in LIMITS
        for flag in limit.flags.split()
        if flag in given
    }
    for one in RELATIONS:
        counts = (not one.given or one.given in given) and given.keys().isdisjoint(one.without)
        both = one.flag in numbers and one.other in numbers
        if counts and both and not one.holds(numbers[one.flag], numbers[one.other]):
            raise ValueError(
                f"--{one.flag} {given[one.flag]} {one.words} --{one.other} {given[one.other]}"
            )
    if given.get("position-embedding-type") == "rope" and "kv-channels" in numbers:
        rotated = int(numbers["kv-channels"] * numbers.get("rotary-percent", 1))
        if rotated + rotated % 2 > numbers["kv-channels"]:
            raise ValueError(
                f"--kv-channels {given['kv-channels']} must be even: --position-embedding-type "
                "rope turns pairs"
            )


def _number(flag: str, text: str, limit: Limit) -> float:
    with suppress(ValueError):
        number = limit.kind(text)
        if limit.allows(number):
            return number
    advice = f": {INSTEAD[flag]}" if flag in INSTEAD else ""
    raise ValueError(f"--{flag} must be {limit.words}, got {text!r}{advice}")
