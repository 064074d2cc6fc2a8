"""The example of a policy-gradient step learns, by one rank and by two the same."""

import os
import runpy
import subprocess
import sys
from pathlib import Path
from unittest import mock

import torch.distributed as dist
from ranks import run_ranks

EXAMPLE = Path(__file__).parents[2] / "examples" / "rl_verl.py"


def rewards_on_rank():
    """In the group that there is already, as torchrun would have the example make it."""
    main = runpy.run_path(str(EXAMPLE))["main"]
    done = {name: mock.Mock() for name in ("init_process_group", "destroy_process_group")}
    under_torchrun = mock.patch.dict(os.environ, RANK=str(dist.get_rank()))
    with mock.patch.multiple(dist, **done), under_torchrun:
        return main()


def test_the_policy_learns_alike_on_one_rank_and_on_two():
    alone = subprocess.run(
        [sys.executable, str(EXAMPLE)], capture_output=True, text=True, check=True, errors="replace"
    )
    first, *_, last = run_ranks(rewards_on_rank, 2)[0]
    assert 0.4 < first < 0.6
    assert last > 0.9
    assert alone.stdout == f"mean reward {first:.2f} at first, {last:.2f} at last\n"
