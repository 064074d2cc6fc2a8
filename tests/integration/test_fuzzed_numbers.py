"""Recipes of random numbers: refused in a sentence, by us or by Megatron, or trained; nothing else.

A number that Megatron does not survive and `launch.limits` does not know ends in a traceback.
"""

import os
import random
import sys

import pytest
from launch import TINY_TRAINING, run_trainer

from megatron_infoentropy import pretrain
from megatron_infoentropy.launch.failures import explain, refusal
from megatron_infoentropy.launch.limits import LIMITS
from megatron_infoentropy.launch.recipe import read_facts

FUZZED = [
    *(*TINY_TRAINING, "--vocab-size=300", "--lr=0.01", "--global-batch-size=2"),
    *("--train-iters=3", "--seed=1"),
    "--tensor-model-parallel-size=1",
    *("--lr-warmup-iters=1", "--eval-interval=2", "--eval-iters=1"),
]
# The made-up data have hundreds of millions of pieces of one token; processes that the tests'
# server has forked cannot start a loader's workers; Megatron exits by raising.
LEFT_OUT = ("seq-length", "num-workers", "exit-interval")
FLAGS = [flag for flag in LIMITS if flag not in LEFT_OUT]
VALUES = [-1, 0, 1, 2, 3, 7, 64, 0.0, 0.5, 1.0, "nan", "inf", "-inf", 1e300, 2**31, 2**63]
RECIPES, TRAINED = 200, 24


def changes():
    generator = random.Random(5)
    for _ in range(RECIPES):
        flags = generator.sample(FLAGS, generator.choice([1, 1, 1, 2, 3]))
        yield [f"--{flag}={generator.choice(VALUES)}" for flag in flags]


def our_refusal(changed):
    try:
        read_facts([*FUZZED, *changed])
    except ValueError as error:
        return str(error)
    return None


def train():
    for stream in (1, 2):  # Megatron's loggers write there, of whoever started the process
        os.dup2(sys.stdout.fileno(), stream)
    pretrain.main()


def megatrons_words(changed, folder):
    try:
        return run_trainer(1, train, (), [*FUZZED, *changed], folder)
    except AssertionError:
        text = (folder / "rank0.log").read_text()
        return refusal(text) or explain(text) or f"neither trained nor refused: {text}"


REFUSALS = {" ".join(changed): our_refusal(changed) for changed in changes()}
POSSIBLE = [changed for changed, said in REFUSALS.items() if said is None]


def test_a_refusal_is_one_sentence_about_a_flag_of_the_recipe():
    refused = {changed: said for changed, said in REFUSALS.items() if said}
    assert len(refused) > 100
    for changed, said in refused.items():
        assert "\n" not in said
        assert any(word.partition("=")[0] in said for word in changed.split())


@pytest.mark.parametrize("changed", POSSIBLE[:TRAINED])
def test_what_is_let_through_trains_or_is_refused_by_megatron_in_a_sentence(changed, tmp_path):
    said = megatrons_words(changed.split(), tmp_path)
    assert "Traceback" not in said
    ends = ("Megatron refuses the flags: ", "the loss of a rank became NaN or infinite: ")
    assert "cross entropy: " in said or said.startswith(ends)
