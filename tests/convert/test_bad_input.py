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
from torch import Tensor

from megatron_infoentropy.checkpoints import write_manifest
from megatron_infoentropy.convert import ConversionError, convert_checkpoint, convert_from_hf
from megatron_infoentropy.convert.checkpoint import MegatronCheckpoint

QKV = "decoder.layers.self_attention.linear_qkv.weight"
ITERATION = Path("save", "iter_0000007")
PIECES = ITERATION / "__0_0.distcp"
TRACKER = "save/latest_checkpointed_iteration.txt"
INDEX = "hf/model.safetensors.index.json"
FIRST, SECOND = (f"hf/model-0000{number}-of-00002.safetensors" for number in (1, 2))
Damage = Callable[[Path], Any]


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


def import_fails(folder: Path, match: str) -> None:
    before = set(folder.iterdir())
    with pytest.raises(ValueError, match=match):
        convert_from_hf(folder / "hf", folder / "back")
    assert set(folder.iterdir()) == before, "nothing may be left"


def written(path: Path | str, content: str | bytes) -> Damage:
    data = content.encode() if isinstance(content, str) else content
    return lambda folder: (folder / path).write_bytes(data)


def removed(path: Path | str) -> Damage:
    return lambda folder: (folder / path).unlink()


def cut(path: Path | str, less: int) -> Damage:
    """Cut a file off by some bytes."""
    return lambda folder: os.truncate(folder / path, (folder / path).stat().st_size - less)


def index_changed(change: Callable[[Any], Any]) -> Damage:
    """Change the index of a checkpoint."""

    def rewrite(folder: Path) -> None:
        path = folder / ITERATION / ".metadata"
        index = pickle.loads(path.read_bytes())
        change(index)
        path.write_bytes(pickle.dumps(index))

    return rewrite


def forget_qkv(index: Any) -> None:
    index.storage_data = {k: v for k, v in index.storage_data.items() if k.fqn != QKV}


def be_of_version_9(index: Any) -> None:
    index.version = "9.0.0"
    del index.storage_data


def without_arguments(folder: Path) -> None:
    shutil.rmtree(folder / "save")
    write_checkpoint(folder / "save", tiny_args(), tiny_tensors(tiny_args()), legacy=True)
    (folder / ITERATION / "common.pt").unlink()


EXPORTS: dict[str, tuple[Damage, str]] = {
    "a missing file": (removed(PIECES), r"__0_0\.distcp is missing"),
    "a file cut off": (cut(PIECES, 5000), r"__0_0\.distcp has \d+ bytes; .* needs \d+"),
    "other bytes": (
        lambda folder: (folder / PIECES).write_bytes(bytes((folder / PIECES).stat().st_size)),
        "expected the archive that torch.save writes",
    ),
    "a rank that did not write": (index_changed(forget_qkv), f"0 of the 4096 numbers of {QKV}"),
    "an index of an unknown version": (
        index_changed(be_of_version_9),
        rf"version 9\.0\.0 .*installed: {re.escape(torch.__version__)}",
    ),
    "an index that calls": (
        lambda f: written(ITERATION / ".metadata", pickle.dumps(Harmful(os.mkdir, f / "made")))(f),
        "not the index",
    ),
    "no tracker": (removed(TRACKER), r"latest_checkpointed_iteration\.txt.*\.metadata"),
    "a tracker cut off": (written(TRACKER, ""), "iteration.txt is empty"),
    "another format": (
        written(ITERATION / "metadata.json", '{"sharded_backend": "zarr"}'),
        "got zarr.*--ckpt-format torch_dist",
    ),
    "an empty description": (written(ITERATION / "metadata.json", ""), r"metadata\.json"),
    "a list as description": (written(ITERATION / "metadata.json", "[]"), r"metadata\.json"),
    "no training arguments": (without_arguments, "no training arguments"),
}


@pytest.mark.parametrize("damage", EXPORTS)
def test_a_damaged_checkpoint_is_not_exported(folder: Path, damage: str) -> None:
    do, match = EXPORTS[damage]
    do(folder)
    export_fails(folder, match)


def test_a_checkpoint_that_is_not_what_its_manifest_says(folder: Path) -> None:
    path = folder / PIECES
    write_manifest(path.parent)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1  # a number stays a number: nothing else would notice
    path.write_bytes(data)
    words = rf"{path.name} has another SHA-256 than when it was saved: copy it again"
    export_fails(folder, words)
    path.write_bytes(data[:-1])
    with pytest.raises(ConversionError, match="bytes, not"):
        MegatronCheckpoint(folder / "save")


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
    evil = folder / ITERATION / "evil.distcp"
    with zipfile.ZipFile(evil, "w") as archive:
        for name, data in (("data.pkl", content), ("version", b"3"), ("data/0", bytes(1 << 16))):
            archive.writestr(f"archive/{name}", data)

    def point(index: Any) -> None:
        for key, place in index.storage_data.items():
            if key.fqn == QKV:
                place.relative_path, place.offset = evil.name, 0
                place.length = evil.stat().st_size

    index_changed(point)(folder)
    export_fails(folder, match)
    assert not (folder / "made").exists()


def test_an_index_with_fields_of_a_later_version_is_read(folder: Path) -> None:
    """Adding a field to TensorProperties is what made older versions of PyTorch fail on it."""
    expected = MegatronCheckpoint(folder / "save").read(QKV)
    path = folder / ITERATION / ".metadata"

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


@pytest.mark.parametrize(
    ("stored", "asked", "value", "said"),
    [
        (torch.float32, "auto", float("nan"), "1 numbers"),
        (torch.bfloat16, "auto", float("inf"), "1 numbers"),
        (torch.float16, "auto", float("-inf"), "1 numbers"),
        (torch.bfloat16, "float16", 1e5, "numbers up to .* float16 ends at .*--dtype"),
        (torch.float32, "float16", -65520.0, "numbers up to"),  # the first that rounds to infinity
        (torch.float32, "bfloat16", 3.4e38, "numbers up to .* bfloat16 ends at"),
    ],
)
def test_numbers_that_are_none_or_beyond_the_dtype_that_is_written(
    tmp_path: Path, stored: torch.dtype, asked: Any, value: float, said: str
) -> None:
    tensors = tiny_tensors(tiny_args(), stored)
    write_checkpoint(tmp_path / "fits", tiny_args(), tensors)
    convert_checkpoint(tmp_path / "fits", tmp_path / "hf", dtype=asked)
    tensors[QKV][1, 3, 5] = value
    write_checkpoint(tmp_path / "save", tiny_args(), tensors)
    with pytest.raises(ConversionError, match=rf"{QKV} \(layer 1\) holds {said}"):
        convert_checkpoint(tmp_path / "save", tmp_path / "out", dtype=asked)
    assert not (tmp_path / "out").exists()


def test_too_little_space(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda place: SimpleNamespace(free=1000))
    export_fails(folder, r"GB of free space for .*out, got 0\.00 GB")
    import_fails(folder, r"GB of free space for .*back")


def map_changed(change: Callable[[dict[str, str]], Any]) -> Damage:
    """Change which file an index names for which tensor."""

    def rewrite(folder: Path) -> None:
        index = json.loads((folder / INDEX).read_text())
        change(index["weight_map"])
        (folder / INDEX).write_text(json.dumps(index))

    return rewrite


def weights_changed(change: Callable[[dict[str, Tensor]], Any], *, keep: bool = False) -> Damage:
    """Put all tensors into one file, changed, in place of the others or (`keep`) beside them."""

    def rewrite(folder: Path) -> None:
        tensors = load_file(folder / FIRST) | load_file(folder / SECOND)
        for path in () if keep else (FIRST, SECOND, INDEX):
            (folder / path).unlink()
        change(tensors)
        save_file(tensors, folder / "hf" / "model.safetensors", {"format": "pt"})

    return rewrite


def as_pickle(folder: Path) -> None:
    for path in (FIRST, SECOND, INDEX):
        (folder / path).unlink()
    (folder / "hf" / "pytorch_model.bin").write_bytes(b"a pickle")


Q_NORM, UP = "model.layers.0.self_attn.q_norm.weight", "model.layers.1.mlp.up_proj.weight"
HEAD, NORM = "lm_head.weight", "model.norm.weight"
IMPORTS: dict[str, tuple[Damage, str]] = {
    "no configuration": (removed("hf/config.json"), r"without config\.json"),
    "a missing file": (removed(SECOND), "model-00002-of-00002.safetensors is missing"),
    "a file cut off": (cut(SECOND, 100), "00002.safetensors is no .*or was cut off"),
    "a header cut off": (written(SECOND, bytes(20)), "00002.safetensors is no safetensors file"),
    "an index with a ghost": (
        map_changed(lambda files: files.update({"ghost": Path(FIRST).name})),
        "says that .* holds ghost, and it does not",
    ),
    "an index without a tensor that transformers would read": (
        map_changed(lambda files: files.pop(HEAD)),
        "does not say that .* holds lm_head",
    ),
    "a whole file beside an index of others": (  # whichever of the two is the earlier export
        weights_changed(lambda tensors: None, keep=True),
        "model.safetensors, which .* would read.*index",
    ),
    "pickled weights": (as_pickle, "pytorch_model.bin.*save it again"),
    "a tensor too many": (
        weights_changed(lambda t: t.update({Q_NORM: torch.ones(8)})),
        "no counterpart for 1 tensors.*q_norm",
    ),
    "a tensor too few": (weights_changed(lambda t: t.pop(UP)), f"lacks the tensor {UP}"),
    "another shape": (
        weights_changed(lambda t: t.update({HEAD: torch.zeros(61, 32)})),
        r"lm_head.weight of shape \[60, 32\].*got \[61, 32\]",
    ),
    "no numbers": (weights_changed(lambda t: t[NORM].fill_(float("nan"))), f"{NORM} holds 32 num"),
    "quantised numbers": (
        weights_changed(lambda t: t.update({HEAD: torch.zeros(60, 32, dtype=torch.int8)})),
        "lm_head.weight in I8",
    ),
}


@pytest.mark.parametrize("damage", IMPORTS)
def test_a_damaged_folder_is_not_imported(folder: Path, damage: str) -> None:
    do, match = IMPORTS[damage]
    do(folder)
    import_fails(folder, match)


def test_an_index_of_a_whole_file_is_taken(folder: Path) -> None:
    weights_changed(lambda tensors: None, keep=True)(folder)
    map_changed(lambda files: files.update(dict.fromkeys(files, "model.safetensors")))(folder)
    convert_from_hf(folder / "hf", folder / "back")


def test_what_is_read_is_not_overwritten(folder: Path) -> None:
    for inside in (folder / "save", folder / ITERATION):
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
