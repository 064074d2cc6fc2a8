"""What the words in a log mean; docs/failures.md says the same."""

from pathlib import Path

import pytest

from megatron_infoentropy.launch.failures import FAILURES, explain

PAGE = (Path(__file__).parents[2] / "docs" / "failures.md").read_text()


@pytest.mark.parametrize("failure", FAILURES, ids=lambda failure: failure.cause)
def test_every_cause_stands_in_the_docs(failure):
    assert f"| {failure.cause} | {failure.advice} |" in PAGE


@pytest.mark.parametrize(
    ("log", "said"),
    [
        ("OSError: [Errno 28] No space left on device", "a disk is full"),
        (
            "RuntimeError: Worker failure: An error is caught while x, error: <class 'OSError'>",
            "full",
        ),
        ("x.DamagedCheckpointError: a/b has 1 bytes, not 2", "none of the checkpoints"),
        ("Timed out waiting 5000ms for recv operation to complete", "a host or its network"),
        ("Connection closed by peer [10.0.0.2]", "lost its connection"),
        ("torch.OutOfMemoryError: CUDA out of memory.", "a GPU's memory"),
        ("RendezvousTimeoutError", "not all nodes came"),
    ],
)
def test_words_of_a_log_are_explained(log, said):
    assert said in explain(f"line\n{log}\nline")


def test_unknown_words_are_not_explained():
    assert explain("Segmentation fault") is None
