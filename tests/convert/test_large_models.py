"""What lets a model be larger than memory, and a conversion be interrupted."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from tiny_checkpoint import TOKENS, tiny_args, tiny_tensors, write_checkpoint

from megatron_infoentropy.convert import convert_checkpoint, verify_conversion
from megatron_infoentropy.convert.distcp import TensorReader
from megatron_infoentropy.convert.output_folder import new_folder

LIMIT = 20_000


@pytest.fixture
def save(tmp_path: Path) -> Path:
    args = tiny_args(num_layers=4)
    return write_checkpoint(tmp_path / "save", args, tiny_tensors(args))


def test_files_are_of_the_size_asked_for_and_the_index_names_what_is_in_them(
    save: Path, tmp_path: Path
) -> None:
    summary = convert_checkpoint(save, tmp_path / "hf", shard_bytes=LIMIT)
    convert_checkpoint(save, tmp_path / "whole")
    files = sorted((tmp_path / "hf").glob("*.safetensors"))
    assert [path.name for path in files] == [
        f"model-{number:05d}-of-{summary.files:05d}.safetensors"
        for number in range(1, summary.files + 1)
    ]
    index = json.loads((tmp_path / "hf" / "model.safetensors.index.json").read_text())
    found = {}
    for path in files:
        assert path.stat().st_size < 1.2 * LIMIT
        with safe_open(path, framework="pt") as opened:
            found |= dict.fromkeys(opened.keys(), path.name)
    assert index["weight_map"] == found
    whole = load_file(tmp_path / "whole" / "model.safetensors")
    assert index["metadata"]["total_size"] == sum(t.numel() * 4 for t in whole.values())
    parts = {name: t for path in files for name, t in load_file(path).items()}
    assert parts.keys() == whole.keys()
    assert all(torch.equal(parts[name], whole[name]) for name in whole)
    assert verify_conversion(save, tmp_path / "hf", TOKENS).passed


def test_no_more_than_a_layer_of_a_stacked_parameter_is_read_at_a_time(
    save: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = []
    part = TensorReader.part

    def counted(*arguments: Any) -> torch.Tensor:
        tensor = part(*arguments)
        sizes.append(tensor.numel())
        return tensor

    monkeypatch.setattr(TensorReader, "part", counted)
    convert_checkpoint(save, tmp_path / "hf")
    assert len(sizes) == 6 * 4 + 3
    assert max(sizes) == 2 * 48 * 32  # gate and up of one layer


def test_an_interrupted_export_is_taken_up_again(
    save: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    part, left = TensorReader.part, [12]

    def interrupted(*arguments: Any) -> torch.Tensor:
        left[0] -= 1
        if not left[0]:
            raise KeyboardInterrupt
        return part(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(TensorReader, "part", interrupted)
        with pytest.raises(KeyboardInterrupt):
            convert_checkpoint(save, tmp_path / "hf", shard_bytes=LIMIT)
    assert not (tmp_path / "hf").exists()
    ready = {
        path.name: path.stat().st_mtime_ns
        for path in (tmp_path / ".hf.partial").glob("*.safetensors")
    }
    assert ready
    convert_checkpoint(save, tmp_path / "hf", shard_bytes=LIMIT)
    times = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "hf").iterdir()}
    assert ready.items() <= times.items(), "what was ready is not written again"
    assert not list((tmp_path / "hf").glob("*.part"))
    assert not list((tmp_path / "hf").glob(".*"))
    convert_checkpoint(save, tmp_path / "fresh", shard_bytes=LIMIT)
    for path in (tmp_path / "fresh").glob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "hf" / path.name).read_bytes()


def interrupted(output: Path, fingerprint: str, expected: str | None) -> None:
    with new_folder(output, fingerprint) as folder:
        file = folder / "file"
        assert (file.read_text() if file.exists() else None) == expected
        file.write_text(fingerprint)
        raise OSError("full")


def test_what_is_left_of_another_export_is_not_used(tmp_path: Path) -> None:
    output = tmp_path / "hf"
    for fingerprint, expected in (("one", None), ("one", "one"), ("two", None)):
        with pytest.raises(OSError, match="full"):
            interrupted(output, fingerprint, expected)
    with new_folder(output, "three") as folder:
        assert not (folder / "file").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_two_processes_do_not_make_the_same_folder(tmp_path: Path) -> None:
    with (
        new_folder(tmp_path / "hf", "one"),
        pytest.raises(ValueError, match=r"another process is writing .*hf"),
        new_folder(tmp_path / "hf", "one"),
    ):
        pass
