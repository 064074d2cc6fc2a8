"""Numbers that no training can start with are refused in a sentence, before anything starts."""

import pytest

from megatron_infoentropy.launch.limits import LIMITS
from megatron_infoentropy.launch.recipe import read_facts, written_flags

TINY = [
    *("--num-layers=4", "--hidden-size=32", "--num-attention-heads=4", "--seq-length=16"),
    *("--micro-batch-size=2", "--global-batch-size=8", "--train-iters=20", "--lr=0.1"),
]


def refused(*words):
    with pytest.raises(ValueError, match=r"^--\S") as error:
        read_facts([*written_flags({}, {}), *words])
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("flag", LIMITS)
def test_every_number_has_both_ends_and_is_a_number(flag):
    limit = LIMITS[flag]
    impossible = ["nan", "inf", "-inf", -1, 10**300, "much", ""]
    for value in impossible if limit.kind is float else [*impossible, 2.5, "1e3", 2**63]:
        assert refused(f"--{flag}={value}").startswith(f"--{flag} must be {limit.words}, got ")


REFUSED = {
    "--eval-interval=0": "got '0': for no validation give --eval-iters 0",
    "--save-interval=0": "got '0': to save at the end alone",
    "--seed=0": "--seed must be a whole number from 1 to 2147483647, got '0'",
    "--lr=nan": "--lr must be a number from 0 to 3.4e+38, got 'nan'",
    "--adam-eps=0": "--adam-eps must be a number above 0",
    "--adam-beta2=1": "--adam-beta2 must be a number of at least 0 and below 1, got '1'",
    "--num-layers": "--num-layers must be a whole number from 1 to 2147483647, got ''",
    "--micro-batch-size=3": "--global-batch-size 8 must be a multiple of --micro-batch-size",
    "--num-attention-heads=5": "--hidden-size 32 must be a multiple of --num-attention-heads",
    "--group-query-attention --num-query-groups=3": "4 must be a multiple of --num-query-groups 3",
    "--pipeline-model-parallel-size=3": "--num-layers 4 must be a multiple of --pipeline-",
    "--tensor-model-parallel-size=8": "--num-attention-heads 4 must be a multiple of --ten",
    "--tensor-model-parallel-size=2 --ffn-hidden-size=33": "33 must be a multiple of --tensor-mo",
    "--swiglu --ffn-hidden-size=7": "must be a multiple of 2 x --tensor-model-parallel",
    "--weight-decay=20": "--weight-decay 20 must be below 2 divided by --lr 0.1",
    "--max-position-embeddings=15": "--seq-length 16 must be at most --max-position-embedd",
    "--vocab-size=9 --padded-vocab-size=8": "--vocab-size 9 must be at most --padded-voc",
    "--min-lr=0.2": "--min-lr 0.2 must be at most --lr 0.1",
    "--lr-warmup-iters=20": "--lr-warmup-iters 20 must be below --train-iters 20",
    "--lr-warmup-iters=9 --lr-decay-iters=9": "--lr-warmup-iters 9 must be below --lr-decay-iters",
    "--kv-channels=7 --position-embedding-type=rope": "--kv-channels 7 must be even",
}


@pytest.mark.parametrize("words", REFUSED)
def test_what_cannot_be_is_told_with_what_to_do(words):
    assert REFUSED[words] in refused(*TINY, *words.split())


@pytest.mark.parametrize(
    "words",
    [
        "--eval-iters=0 --lr-warmup-iters=0 --min-lr=0 --clip-grad=0 --num-workers=0",
        "--num-attention-heads=5 --kv-channels=8",
        "--num-query-groups=3",  # of no effect without --group-query-attention
        "--pipeline-model-parallel-size=3 --decoder-first-pipeline-num-layers=2",
        "--lr-warmup-iters=20 --lr-decay-iters=21",
    ],
)
def test_what_can_be_is_let_through(words):
    read_facts([*written_flags({}, {}), *TINY, *words.split()])
