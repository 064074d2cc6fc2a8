"""Models larger than memory: files of a size, layer by layer; and conversions that do not end."""

import json
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_checkpoint import tiny_args, tiny_tensors, weights_of, write_checkpoint, write_tiny

from megatron_infoentropy.convert import convert_checkpoint, convert_from_hf
from megatron_infoentropy.convert.distcp import DistcpReader
from megatron_infoentropy.convert.hf_weights import HuggingFaceWeights

LIMIT = 20_000
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


@pytest.fixture
def save(tmp_path: Path) -> Path:
    return write_tiny(tmp_path / "save", num_layers=4)


def test_files_are_of_the_size_asked_for_and_the_index_names_what_is_in_them(
    save: Path, tmp_path: Path
) -> None:
    convert_checkpoint(save, tmp_path / "hf", shard_bytes=LIMIT)
    files = sorted((tmp_path / "hf").glob("*.safetensors"))
    assert [path.name for path in files] == [
        f"model-{number:05d}-of-{len(files):05d}.safetensors" for number in range(1, len(files) + 1)
    ]
    assert max(path.stat().st_size for path in files) < 1.2 * LIMIT
    index = json.loads((tmp_path / "hf" / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == {name: path.name for path in files for name in load_file(path)}
    weights = weights_of(tmp_path / "hf").values()
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in weights)


@pytest.mark.parametrize(
    ("of", "convert", "source"),
    [
        (DistcpReader, partial(convert_checkpoint, shard_bytes=LIMIT), "save"),
        (HuggingFaceWeights, convert_from_hf, "hf"),
    ],
)
def test_an_interrupted_conversion_leaves_nothing(
    save: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, of: Any, convert: Any, source: str
) -> None:
    convert_checkpoint(save, tmp_path / "hf")
    read, left = of.read, [12]

    def interrupted(*arguments: Any) -> torch.Tensor:
        left[0] -= 1
        if not left[0]:
            raise KeyboardInterrupt
        tensor: torch.Tensor = read(*arguments)
        return tensor

    monkeypatch.setattr(of, "read", interrupted)
    with pytest.raises(KeyboardInterrupt):
        convert(tmp_path / source, tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"save", "hf"}


def test_exported_files_may_be_read_by_whom_the_folder_is_for(save: Path, tmp_path: Path) -> None:
    convert_checkpoint(save, tmp_path / "hf")
    modes = {path.stat().st_mode for path in (tmp_path / "hf").iterdir()}
    assert len(modes) == 1, "safetensors makes its file for its owner alone"


def test_a_model_of_180_mb_is_converted_in_a_third_of_that(tmp_path: Path) -> None:
    """One layer's tensor, of 19 MB, and one file's are held at a time, in both directions."""
    large = tiny_args(num_layers=10, hidden_size=256, ffn_hidden_size=6144)
    for name, args in (("large", large), ("small", tiny_args())):
        write_checkpoint(tmp_path / "save" / name, args, tiny_tensors(args))
        convert_checkpoint(tmp_path / "save" / name, tmp_path / "hf" / name)
    assert (tmp_path / "hf" / "large" / "model.safetensors").stat().st_size > 180e6
    words = [sys.executable, "-c", MEASURE, str(tmp_path), str(tmp_path / "out")]
    done = subprocess.run(words, capture_output=True, text=True)
    grown = {side: int(size) for side, size in map(str.split, done.stdout.splitlines())}
    assert grown.keys() == {"save", "hf"}, done.stderr
    assert max(grown.values()) < 60e6, grown
