"""Files made to do harm: names that lead out of a folder, data that swells."""

import gzip
import json

import pytest
import zstandard

from megatron_infoentropy.convert import ConversionError
from megatron_infoentropy.convert.distcp import _place
from megatron_infoentropy.convert.hf_weights import HuggingFaceWeights
from megatron_infoentropy.data import blocks
from megatron_infoentropy.data.blocks import BrokenLineError, read_blocks
from megatron_infoentropy.data.manifest import load_manifest

OUTSIDE = ["../secret", "/etc/passwd", "..", ".", "", "a/../../b", "sub/a", "a\0"]


@pytest.mark.parametrize("name", OUTSIDE)
def test_a_dataset_manifest_cannot_name_files_elsewhere(tmp_path, name):
    facts = {"prefix": name, "documents": 1, "tokens": 1, "bytes": 1}
    tokenizer = {"sha256": "0", "vocab_size": 10, "eod_id": 0}
    content = {"format": 3, "shard": None, "tokenizer": tokenizer, "dtype": "uint16"}
    (tmp_path / "manifest.json").write_text(json.dumps({**content, "domains": {"a": facts}}))
    with pytest.raises(ValueError, match="is no name of a file in this folder"):
        load_manifest(tmp_path)


@pytest.mark.parametrize("name", OUTSIDE)
def test_an_index_of_weights_cannot_name_files_elsewhere(tmp_path, name):
    index = {"weight_map": {"tensor": name}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ConversionError, match="is no name of a file in this folder"):
        HuggingFaceWeights(tmp_path)


@pytest.mark.parametrize("name", OUTSIDE)
def test_an_index_of_a_checkpoint_cannot_name_files_elsewhere(name):
    with pytest.raises(ValueError, match="is no name of a file in this folder"):
        _place({"relative_path": name, "offset": 0, "length": 10})


COMPRESS = {".zst": zstandard.ZstdCompressor(level=19).compress, ".gz": gzip.compress}


@pytest.fixture
def small_limits(monkeypatch):
    """A thousandth of the real ones, so that a bomb takes a moment."""
    monkeypatch.setattr(blocks, "FREE_BYTES", 1 << 20)
    monkeypatch.setattr(blocks, "MAX_RATIO", 100)
    monkeypatch.setattr(blocks, "MAX_LINE_BYTES", 1 << 18)


@pytest.mark.parametrize("suffix", COMPRESS)
def test_a_file_that_swells_is_refused_by_name(tmp_path, small_limits, monkeypatch, suffix):
    monkeypatch.setattr(blocks, "MAX_LINE_BYTES", 1 << 40)
    path = tmp_path / f"bomb.jsonl{suffix}"
    path.write_bytes(COMPRESS[suffix](bytes(30 << 20)))
    with pytest.raises(BrokenLineError, match=r"compressed bytes became more than \d+ MB"):
        list(read_blocks(path))


def test_a_line_without_end_is_refused_after_those_before_it(tmp_path, small_limits):
    path = tmp_path / "long.jsonl"
    path.write_bytes(b"first\nsecond\n" + b"x" * (1 << 20))
    read = []
    with pytest.raises(BrokenLineError, match=r"long.jsonl:3: a line of more than 0 MiB"):
        read.extend(block.data for block in read_blocks(path))
    assert b"".join(read) == b"first\nsecond\n"


def test_one_step_of_a_bomb_is_bounded(tmp_path):
    """What is held at once, with the real limits, not the gigabytes that one frame asks."""
    path = tmp_path / "bomb.jsonl.zst"
    path.write_bytes(COMPRESS[".zst"](bytes(400 << 20)))
    largest = max(len(chunk) for chunk in blocks.read_chunks(path, lambda _: None))
    assert largest <= 128 << 20
