"""Export and import hold one layer's tensor and one file's at a time, not the model."""

import subprocess
import sys
from pathlib import Path

import pytest
from tiny_checkpoint import tiny_args, tiny_tensors, write_checkpoint

from megatron_infoentropy.convert import convert_checkpoint

MEASURE = """
import os, sys
from functools import partial
from pathlib import Path
from megatron_infoentropy.convert import convert_checkpoint, convert_from_hf
def peak():
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024
def grown(run, models, output):
    run(models / "small", output / "small")
    before = peak()
    run(models / "large", output / "large")
    return peak() - before
folder, output = map(Path, sys.argv[1:])
export = partial(convert_checkpoint, shard_bytes=20_000_000)
for side, run in (("save", export), ("hf", convert_from_hf)):
    if os.fork() == 0:  # a peak of its own
        print(side, grown(run, folder / side, output / side), flush=True)
        os._exit(0)
    os.wait()
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


def test_a_model_of_180_mb_is_converted_in_a_third_of_that(folder: Path, tmp_path: Path) -> None:
    words = [sys.executable, "-c", MEASURE, str(folder), str(tmp_path)]
    done = subprocess.run(words, capture_output=True, text=True)
    grown = {side: int(size) for side, size in map(str.split, done.stdout.splitlines())}
    assert grown.keys() == {"save", "hf"}, done.stderr
    assert max(grown.values()) < 60e6, grown
