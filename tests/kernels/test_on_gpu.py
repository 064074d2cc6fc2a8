"""What on_gpu.py copies there and back, and what sanitized_calls.py checks, without a GPU."""

import re
from pathlib import Path

import on_gpu
import pytest
import sanitized_calls
import torch

from megatron_infoentropy.kernels import native
from megatron_infoentropy.kernels.contract import PLAIN, Shard


@pytest.fixture
def seen(monkeypatch):
    """Logits and outputs as the kernels got them."""
    monkeypatch.setattr(on_gpu, "DEVICE", "cpu")
    found = []

    def gradient(*arguments):
        found.append((arguments[0], arguments[5]))
        native.shard_gradient(*arguments)

    kernels = on_gpu.Kernels("native", native.shard_statistics, gradient)
    return on_gpu.through_gpu(kernels), found


@pytest.mark.parametrize("in_place", [False, True])
def test_layouts_go_along_and_results_come_back(seen, in_place):
    kernels, found = seen
    wide = torch.randn(4, 20, generator=torch.Generator().manual_seed(0))
    logits, target, shard = wide[:, 3:12], torch.tensor([0, -100, 5, 8]), Shard(0, 7, -100)
    case, inverse = (target, shard, PLAIN), torch.linspace(0.5, 2, 4)
    statistics = kernels.shard_statistics(logits, *case, inverse)
    assert torch.equal(statistics, native.shard_statistics(logits, *case, inverse))
    expected, around = torch.empty(4, 9), wide.clone()
    native.shard_gradient(logits, *case, statistics, expected, inverse)
    out = logits if in_place else torch.full((4, 13), 7.0)[:, 2:11]
    kernels.shard_gradient(logits, *case, statistics, out, inverse)
    assert torch.equal(out, expected)
    assert torch.equal(wide[:, :3], around[:, :3])
    there, its_out = found[0]
    assert there.data_ptr() != logits.data_ptr()
    assert (there.data_ptr() == its_out.data_ptr()) == in_place
    assert (there.stride(), there.storage_offset()) == ((20, 1), 3)


def test_the_sanitized_calls_see_a_wrong_gradient():
    def wrong(*arguments):
        native.shard_gradient(*arguments)
        arguments[5][0, 0] += 1

    kernels = on_gpu.Kernels("wrong", native.shard_statistics, wrong)
    with pytest.raises(AssertionError):
        sanitized_calls.check(kernels, *sanitized_calls.SETTINGS[0])


def test_every_setting_has_a_process_in_the_gpu_command():
    script = Path(__file__).parents[2] / "tools" / "gpu.sh"
    (last,) = re.findall(r"--setting\\ \{0\.\.(\d+)\}", script.read_text())
    assert int(last) == len(sanitized_calls.SETTINGS) - 1
