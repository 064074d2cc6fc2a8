"""Export and import hold one layer's tensor and one file's at a time, not the model."""

import subprocess
import sys
from pathlib import Path

import pytest
from tiny_checkpoint import tiny_args, tiny_tensors, write_checkpoint

from megatron_infoentropy.convert import convert_checkpoint

MEASURE = """
import sys
from functools import partial
from pathlib import Path
from megatron_infoentropy.convert import convert_checkpoint, convert_from_hf
def peak():
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024
large, small, output = map(Path, sys.argv[1:4])
export = partial(convert_checkpoint, shard_bytes=20_000_000)
run = convert_from_hf if (large / "config.json").exists() else export
run(small, output / "small")
before = peak()
run(large, output / "large")
sys.stdout.write(str(peak() - before))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of more than 180 MB, in layers of 19, and a small one, on both sides."""
    folder = tmp_path_factory.mktemp("memory")
    large = tiny_args(num_layers=10, hidden_size=256, ffn_hidden_size=6144)
    for name, args in (("large", large), ("small", tiny_args())):
        tensors = tiny_tensors(args)
        write_checkpoint(folder / "save" / name, args, tensors)
        convert_checkpoint(folder / "save" / name, folder / "hf" / name)
    assert (folder / "hf" / "large" / "model.safetensors").stat().st_size > 180e6
    return folder


@pytest.mark.parametrize("side", ["save", "hf"])
def test_a_model_of_180_mb_is_converted_in_a_third_of_that(
    folder: Path, tmp_path: Path, side: str
) -> None:
    words = [sys.executable, "-c", MEASURE, str(folder / side / "large")]
    words += [str(folder / side / "small"), str(tmp_path)]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 60e6, done.stdout
