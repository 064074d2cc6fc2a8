"""A tiny data set, ranks that start fast, and machines with a real Slurm and a real sshd."""

import pytest
from cluster_runs import make_tokens
from machines import machines as start_machines
from machines import why_not


def pytest_runtest_setup(item):
    """Skip all from here, so that pytest says it in one line."""
    if "machines" in item.fixturenames and (reason := why_not()):
        pytest.skip(f"{reason}: `make test-cluster` says what they need")


@pytest.fixture(scope="session")
def tokens(tmp_path_factory):
    return make_tokens(tmp_path_factory.mktemp("tokens"))


@pytest.fixture(scope="module")
def machines(request):
    """A head and two nodes, whose sbatch, scancel, ssh, ... are on PATH; ranks start fast."""
    ranks = request.getfixturevalue("quick_ranks")
    with start_machines(ranks) as made, pytest.MonkeyPatch.context() as patch, made.on_path():
        for name, value in ranks.items():
            patch.setenv(name, value)
        yield made


@pytest.fixture(scope="module")
def slurm(machines):
    """The machines with Slurm running."""
    machines.serve_slurm()
    return machines
