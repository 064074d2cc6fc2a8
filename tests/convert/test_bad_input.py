"""Damaged input: named before, or without, a visible output."""

import json
import os
import pickle
import re
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_checkpoint import Harmful, tiny_args, tiny_tensors, write_checkpoint, write_tiny
from tiny_tokenizer import write_tokenizer

from megatron_infoentropy.checkpoints import write_manifest
from megatron_infoentropy.convert import (
    ConversionError,
    convert_checkpoint,
    convert_from_hf,
)
from megatron_infoentropy.convert.checkpoint import MegatronCheckpoint

QKV = "decoder.layers.self_attention.linear_qkv.weight"
PIECES = "iter_0000007/__0_0.distcp"
INDEX = "model.safetensors.index.json"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint `save` and, in two files, the Hugging Face folder `hf` of the same model."""
    write_tiny(tmp_path / "save")
    convert_checkpoint(tmp_path / "save", tmp_path / "hf", shard_bytes=60_000)
    return tmp_path


def export_fails(folder: Path, match: str) -> None:
    before = set(folder.iterdir())
    with pytest.raises(ValueError, match=match):
        convert_checkpoint(folder / "save", folder / "out")
    assert set(folder.iterdir()) == before, "nothing may be left"


def test_a_missing_file_of_the_checkpoint(folder: Path) -> None:
    (folder / "save" / PIECES).unlink()
    export_fails(folder, r"__0_0\.distcp is missing")


def test_a_file_of_the_checkpoint_that_was_cut_off(folder: Path) -> None:
    path = folder / "save" / PIECES
    os.truncate(path, path.stat().st_size - 5000)
    export_fails(folder, r"__0_0\.distcp has \d+ bytes; .* needs \d+")


def test_a_file_of_the_checkpoint_with_other_bytes(folder: Path) -> None:
    path = folder / "save" / PIECES
    path.write_bytes(bytes(path.stat().st_size))
    export_fails(folder, "expected the archive that torch.save writes")


def test_a_checkpoint_that_is_not_what_its_manifest_says(folder: Path) -> None:
    path = folder / "save" / PIECES
    write_manifest(path.parent)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1  # a number stays a number: nothing else would notice
    path.write_bytes(data)
    words = rf"{path.name} has another SHA-256 than when it was saved: copy it again"
    export_fails(folder, words)
    path.write_bytes(data[:-1])
    with pytest.raises(ConversionError, match="bytes, not"):
        MegatronCheckpoint(folder / "save")


def rewrite_index(folder: Path, change: Callable[[Any], None]) -> None:
    path = folder / "save" / "iter_0000007" / ".metadata"
    index = pickle.loads(path.read_bytes())
    change(index)
    path.write_bytes(pickle.dumps(index))


def test_a_rank_that_did_not_write_its_part(folder: Path) -> None:
    def forget(index: Any) -> None:
        index.storage_data = {k: v for k, v in index.storage_data.items() if k.fqn != QKV}

    rewrite_index(folder, forget)
    export_fails(folder, rf"0 of the 4096 numbers of {re.escape(QKV)}")


@pytest.mark.parametrize(
    ("kind", "match"), [("a call", "UnpicklingError"), ("a key without end", "parts in a pickle")]
)
def test_a_tensor_made_to_do_harm_is_refused(folder: Path, kind: str, match: str) -> None:
    """In the place of a real one, and as large; the hash of such a key would take for ever."""
    tree: Any = ()
    for _ in range(60):
        tree = (tree, tree)
    content = b"\x80\x02}" + pickle.dumps(tree, protocol=2)[2:-1] + b"K\x01s."  # {tree: 1}
    if kind == "a call":
        content = pickle.dumps(Harmful(os.mkdir, str(folder / "made")), protocol=2)
    evil = folder / "save" / "iter_0000007" / "evil.distcp"
    with zipfile.ZipFile(evil, "w") as archive:
        for name, data in (("data.pkl", content), ("version", b"3"), ("data/0", bytes(1 << 16))):
            archive.writestr(f"archive/{name}", data)

    def point(index: Any) -> None:
        for key, place in index.storage_data.items():
            if key.fqn == QKV:
                place.relative_path, place.offset = evil.name, 0
                place.length = evil.stat().st_size

    rewrite_index(folder, point)
    export_fails(folder, match)
    assert not (folder / "made").exists()


def test_an_index_of_an_unknown_version_names_both_versions(folder: Path) -> None:
    def change(index: Any) -> None:
        index.version = "9.0.0"
        del index.storage_data

    rewrite_index(folder, change)
    installed = re.escape(torch.__version__)
    export_fails(folder, rf"version 9\.0\.0 .*installed: {installed}")


def test_an_index_with_fields_of_a_later_version_is_read(folder: Path) -> None:
    """Adding a field to TensorProperties is what made older versions of PyTorch fail on it."""
    expected = MegatronCheckpoint(folder / "save").read(QKV)
    path = folder / "save" / "iter_0000007" / ".metadata"

    def later_state(properties: Any) -> tuple[Any, ...]:
        return (properties.dtype, None, False, None, False, None, "one more", "and another")

    index = pickle.loads(path.read_bytes())
    with pytest.MonkeyPatch.context() as patch:
        kind = type(index.state_dict_metadata[QKV].properties)
        patch.setattr(kind, "__getstate__", later_state)
        path.write_bytes(pickle.dumps(index))
    with pytest.raises(ValueError, match="too many values"):
        pickle.loads(path.read_bytes())
    assert torch.equal(MegatronCheckpoint(folder / "save").read(QKV), expected)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_numbers_that_are_none(tmp_path: Path, value: float, dtype: torch.dtype) -> None:
    args = tiny_args()
    tensors = tiny_tensors(args, dtype)
    tensors[QKV][1, 3, 5] = value
    write_checkpoint(tmp_path / "save", args, tensors)
    export_fails(tmp_path, rf"{QKV} \(layer 1\) holds 1 numbers")


@pytest.mark.parametrize(
    ("stored", "asked", "value"),
    [
        (torch.bfloat16, "float16", 1e5),
        (torch.float32, "float16", -65520.0),  # the first that rounds to infinity
        (torch.float32, "bfloat16", 3.4e38),
    ],
)
def test_numbers_beyond_the_dtype_that_is_written(
    tmp_path: Path, stored: torch.dtype, asked: Any, value: float
) -> None:
    args = tiny_args()
    tensors = tiny_tensors(args, stored)
    write_checkpoint(tmp_path / "fits", args, tensors)
    convert_checkpoint(tmp_path / "fits", tmp_path / "hf", dtype=asked)
    tensors[QKV][1, 3, 5] = value
    write_checkpoint(tmp_path / "save", args, tensors)
    words = rf"{QKV} \(layer 1\) holds numbers up to .* {asked} ends at .*--dtype"
    with pytest.raises(ConversionError, match=words):
        convert_checkpoint(tmp_path / "save", tmp_path / "out", dtype=asked)
    assert not (tmp_path / "out").exists()


def test_too_little_space(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda place: SimpleNamespace(free=1000))
    export_fails(folder, r"GB of free space for .*out, got 0\.00 GB")
    with pytest.raises(ValueError, match=r"GB of free space for .*back"):
        convert_from_hf(folder / "hf", folder / "back")


def import_fails(folder: Path, match: str) -> None:
    before = set(folder.iterdir())
    with pytest.raises(ValueError, match=match):
        convert_from_hf(folder / "hf", folder / "back")
    assert set(folder.iterdir()) == before, "nothing may be left"


def test_a_missing_file_of_weights(folder: Path) -> None:
    (folder / "hf" / "model-00002-of-00002.safetensors").unlink()
    import_fails(folder, "model-00002-of-00002.safetensors is missing")


def test_a_file_of_weights_that_was_cut_off(folder: Path) -> None:
    path = folder / "hf" / "model-00002-of-00002.safetensors"
    os.truncate(path, path.stat().st_size - 100)
    import_fails(folder, f"{path.name} is no .*or was cut off")
    os.truncate(path, 20)
    import_fails(folder, f"{path.name} is no safetensors file")


def test_an_index_that_names_a_tensor_no_file_holds(folder: Path) -> None:
    index = json.loads((folder / "hf" / INDEX).read_text())
    index["weight_map"]["ghost"] = "model-00001-of-00002.safetensors"
    (folder / "hf" / INDEX).write_text(json.dumps(index))
    import_fails(folder, "says that .* holds ghost, and it does not")


def test_an_index_that_leaves_out_a_tensor_which_transformers_would_read(folder: Path) -> None:
    index = json.loads((folder / "hf" / INDEX).read_text())
    file = index["weight_map"].pop("lm_head.weight")
    (folder / "hf" / INDEX).write_text(json.dumps(index))
    import_fails(folder, f"does not say that {file} holds lm_head")


def test_a_whole_file_beside_an_index_of_others(folder: Path) -> None:
    """Transformers reads the whole file, whichever of the two is the earlier export."""
    index = json.loads((folder / "hf" / INDEX).read_text())
    change_weights(folder, lambda tensors: None, keep=True)
    import_fails(folder, "model.safetensors, which .* would read.*index")
    index["weight_map"] = dict.fromkeys(index["weight_map"], "model.safetensors")
    (folder / "hf" / INDEX).write_text(json.dumps(index))
    convert_from_hf(folder / "hf", folder / "back")


def test_pickled_weights_are_not_opened(folder: Path) -> None:
    for path in (folder / "hf").glob("model*"):
        path.unlink()
    (folder / "hf" / "pytorch_model.bin").write_bytes(b"a pickle")
    import_fails(folder, "pytorch_model.bin.*save it again")


def change_weights(
    folder: Path, change: Callable[[dict[str, torch.Tensor]], Any], *, keep: bool = False
) -> None:
    """Put all tensors into one file, changed, in place of the others or (`keep`) beside them."""
    tensors: dict[str, torch.Tensor] = {}
    for path in (folder / "hf").glob("model*"):
        if path.suffix == ".safetensors":
            tensors |= load_file(path)
        if not keep:
            path.unlink()
    change(tensors)
    save_file(tensors, folder / "hf" / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (
            lambda t: t.update({"model.layers.0.self_attn.q_norm.weight": torch.ones(8)}),
            "no counterpart for 1 tensors.*q_norm",
        ),
        (
            lambda t: t.pop("model.layers.1.mlp.up_proj.weight"),
            "lacks the tensor model.layers.1.mlp.up_proj.weight",
        ),
        (
            lambda t: t.update({"lm_head.weight": torch.zeros(61, 32)}),
            r"lm_head.weight of shape \[60, 32\].*got \[61, 32\]",
        ),
        (
            lambda t: t["model.norm.weight"].fill_(float("nan")),
            "model.norm.weight holds 32 numbers",
        ),
        (
            lambda t: t.update({"lm_head.weight": torch.zeros(60, 32, dtype=torch.int8)}),
            "lm_head.weight in I8",
        ),
    ],
)
def test_weights_that_do_not_fit_the_configuration(
    folder: Path, change: Callable[[Any], Any], match: str
) -> None:
    change_weights(folder, change)
    import_fails(folder, match)


def test_what_is_read_is_not_overwritten(folder: Path) -> None:
    for inside in (folder / "save", folder / "save" / "iter_0000007"):
        with pytest.raises(ValueError, match="would take the place of"):
            convert_checkpoint(inside, folder / "save", overwrite=True)
    with pytest.raises(ValueError, match="would take the place of"):
        convert_from_hf(folder / "hf", folder / "hf", overwrite=True)
    assert MegatronCheckpoint(folder / "save").iteration == 7


def test_an_unknown_dtype_is_refused_before_anything_is_read(folder: Path) -> None:
    with pytest.raises(ValueError, match="auto, float32, bfloat16, float16; got 'bf16'"):
        convert_checkpoint(folder / "absent", folder / "out", dtype="bf16")  # type: ignore[arg-type]


@pytest.mark.parametrize("content", ["", "{", "[]"])
@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_a_damaged_file_of_the_tokenizer_is_named(folder: Path, name: str, content: str) -> None:
    tokenizer = write_tokenizer(folder / "tokenizer", 60)
    (tokenizer / name).write_text(content)
    with pytest.raises(ValueError, match=re.escape(str(tokenizer / name))):
        convert_checkpoint(folder / "save", folder / "out", tokenizer=tokenizer)


@pytest.mark.parametrize("content", ["", "[]"])
def test_a_damaged_description_of_the_checkpoint_is_named(folder: Path, content: str) -> None:
    path = folder / "save" / "iter_0000007" / "metadata.json"
    path.write_text(content)
    export_fails(folder, re.escape(str(path)))
