"""The example of a policy-gradient step learns, by one rank and by two the same."""

import subprocess
import sys
from pathlib import Path

EXAMPLE = Path(__file__).parents[2] / "examples" / "rl_verl.py"
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


def rewards_by(*command):
    done = subprocess.run(
        [*command, str(EXAMPLE)], capture_output=True, text=True, check=True, errors="replace"
    )
    words = done.stdout.split()  # mean reward X at first, Y at last
    return float(words[2]), float(words[5])


def test_the_policy_learns_alike_on_one_rank_and_on_two():
    first, last = rewards_by(sys.executable)
    assert 0.4 < first < 0.6
    assert last > 0.9
    assert rewards_by(*TORCHRUN) == (first, last)
