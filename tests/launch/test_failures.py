"""What the words in a log mean; docs/failures.md says the same."""

from pathlib import Path

import pytest

from megatron_infoentropy.launch.failures import FAILURES, explain, refusal

PAGE = (Path(__file__).parents[2] / "docs" / "failures.md").read_text()


@pytest.mark.parametrize("failure", FAILURES, ids=lambda failure: failure.cause)
def test_every_cause_stands_in_the_docs(failure):
    assert f"| {failure.cause} | {failure.advice} |" in PAGE


LOGS = {
    "OSError: [Errno 28] No space left on device": "a disk is full",
    "Worker failure: An error is caught while x, error: <class 'OSError'>": "its disk is full",
    "x.DamagedCheckpointError: a/b has 1 bytes, not 2": "none of the checkpoints",
    "Timed out waiting 5000ms for recv operation to complete": "a host or its network",
    "Connection closed by peer [10.0.0.2]": "lost its connection",
    "x.CheckpointingException: Global shape mismatch for loaded": "of another shape",
    "    assert self.lr_warmup_steps < self.lr_decay_steps": "warm up for the whole",
    "torch.OutOfMemoryError: CUDA out of memory.": "a GPU's memory",
    "RendezvousTimeoutError": "not all nodes came",
    "x/api.py:752] Received 15 death signal, shutting down workers": "a signal told torchrun",
}


@pytest.mark.parametrize("log", LOGS)
def test_words_of_a_log_are_explained(log):
    assert LOGS[log] in explain(f"line\n{log}\nline")


def test_unknown_words_are_not_explained():
    assert explain("Segmentation fault") is None


USAGE = """usage: pretrain.py [-h]
                   [--num-layers NUM_LAYERS]
                   [--infoentropy-objective {infoentropy,focal}]
pretrain.py: error: """


@pytest.mark.parametrize(
    ("said", "meant"),
    [
        ("unrecognized arguments: --num-layres 2", "; is --num-layers meant?"),
        ("unrecognized arguments: --objektive focal", "; is --infoentropy-objective meant?"),
        ("unrecognized arguments: --xyz --num-layer=2", "; is --num-layers meant?"),
        ("unrecognized arguments: --xyz", ""),
        ("argument --num-layers: invalid int value: 'a'", ""),
    ],
)
def test_a_flag_that_is_refused_is_one_sentence(said, meant):
    assert refusal(f"{USAGE}{said}\n") == f"Megatron refuses the flags: {said}{meant}"


def test_what_a_check_refuses_before_a_model_is_built_is_one_sentence():
    traceback = """Traceback (most recent call last):
  File "/x/megatron_infoentropy/pretrain.py", line 47, in {where}
    model_config = gpt_config_from_args(args)
  File "<string>", line 309, in __init__
ValueError: 4 heads must be a multiple of 3
"""
    said = "Megatron refuses the flags: 4 heads must be a multiple of 3"
    assert refusal(traceback.format(where="prepare")) == said
    assert refusal(traceback.format(where="train")) is None
    ranked = "\n".join(f"[rank1]: {x}" for x in traceback.format(where="prepare").splitlines())
    assert refusal(ranked) == said
