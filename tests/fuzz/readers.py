"""What the fuzzers call, a function a reader, and its seeds.

A harness goes from any bytes to nothing or to a named error; any other exception is a finding.
`folder` is where a reader finds its file, in memory at best. Seeds are small and nearly all valid;
in corpus/ is what was found since.
"""

import gzip
import io
import json
import pickle
import random
import struct
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import zstandard
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from megatron_infoentropy.checkpoints import MANIFEST, find_damage
from megatron_infoentropy.convert.distcp import DistcpReader
from megatron_infoentropy.convert.errors import ConversionError
from megatron_infoentropy.convert.hf_weights import HuggingFaceWeights
from megatron_infoentropy.convert.unpickle import load_object
from megatron_infoentropy.data.blocks import SUFFIXES, BrokenLineError, Keys
from megatron_infoentropy.data.indexed import IndexedReader
from megatron_infoentropy.data.jsonl import read_documents
from megatron_infoentropy.launch.recipe import RecipeError, load_plan, load_recipe, to_command_line


def text(data: bytes, folder: Path) -> None:
    """The first byte says how the rest is compressed."""
    if not data:
        return
    path = folder / f"text{SUFFIXES[data[0] % len(SUFFIXES)]}"
    path.write_bytes(data[1:])
    for record in read_documents(path, Keys("text", "meta.pile_set_name")):
        assert record.text_bytes == len(record.text.encode())
        assert record.domain


def index(data: bytes, folder: Path) -> None:
    """An .idx beside eight bytes of tokens."""
    (folder / "a.idx").write_bytes(data)
    (folder / "a.bin").write_bytes(bytes(range(8)))
    reader = IndexedReader(folder / "a")
    if not reader.disorder():
        assert sum(int(lengths.sum()) for _, lengths in reader.pieces()) == reader.tokens.size
        assert sum(len(reader[i]) for i in range(len(reader))) == reader.tokens.size


def recipe(data: bytes, folder: Path) -> None:
    path = folder / "recipe.yaml"
    path.write_bytes(data)
    words = to_command_line(load_recipe(path))
    assert all(isinstance(word, str) for word in words)
    load_plan(path)


def metadata(data: bytes, folder: Path) -> None:
    """A checkpoint's .metadata; of its pieces there are 4096 zeros."""
    (folder / ".metadata").write_bytes(data)
    (folder / "__0_0.distcp").write_bytes(bytes(4096))
    reader = DistcpReader(folder)
    reader.require_complete(reader.tensors)
    for name, tensor in reader.tensors.items():
        if tensor.shape and tensor.shape[0]:
            reader.read(name, (0,))


def arguments(data: bytes, folder: Path) -> None:
    """What torch.save wrote: a checkpoint's training arguments."""
    load_object(io.BytesIO(data), "common.pt")


def weights(data: bytes, folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(data)
    stored = HuggingFaceWeights(folder)
    for name in stored.tensors:
        stored.read(name)


def manifest(data: bytes, folder: Path) -> None:
    (folder / MANIFEST).write_bytes(data)
    (folder / "__0_0.distcp").write_bytes(bytes(16))
    assert isinstance(find_damage(folder), str)


CORPUS = Path(__file__).parent / "corpus"
LINES = b'{"text": "a \\u00e4", "meta": {"pile_set_name": "A"}}\n{"text": "", "meta": {}}\n'


def text_seeds() -> list[bytes]:
    plain = [LINES, b"", b"\n\n", b'{"text": 1}', LINES[:30], b'{"text": "\\ud800"}', b"[" * 50]
    packed = [zstandard.ZstdCompressor().compress(LINES), gzip.compress(LINES, mtime=0)]
    return [b"\0" + data for data in plain] + [b"\1" + packed[0], b"\2" + packed[1]]


def index_seeds() -> list[bytes]:
    head = struct.pack("<9sQBQQ", b"MMIDIDX\0\0", 1, 8, 2, 4)
    body = struct.pack("<2i2q4q", 3, 1, 0, 6, 0, 1, 1, 2)
    empty = struct.pack("<9sQBQQ", b"MMIDIDX\0\0", 1, 4, 0, 1) + bytes(8)
    return [head + body, empty, head, head[:20]]


def recipe_seeds() -> list[bytes]:
    return [
        b"model:\n  num-layers: 4\n  swiglu: true\n  betas: [0.9, 0.95]\nlaunch:\n  ranks: 2\n",
        b"a: &x {b: 1}\nc: *x\n",
        b"a: {b: 2026-01-01}\n",
        b"- a\n",
    ]


def metadata_seeds() -> list[bytes]:
    properties = TensorProperties(dtype=torch.float32)
    chunk = ChunkStorageMetadata(torch.Size([0, 0]), torch.Size([2, 3]))
    entry = TensorStorageMetadata(properties, torch.Size([2, 3]), [chunk])
    storage = {
        MetadataIndex("w", torch.Size([0, 0])): _StorageInfo("__0_0.distcp", 0, 1000),
        MetadataIndex("common_state"): _StorageInfo("__0_0.distcp", 1000, 10),
    }
    return [
        pickle.dumps(Metadata({"w": entry, "common_state": BytesStorageMetadata()}, {}, storage))
    ]


def arguments_seeds() -> list[bytes]:
    file = io.BytesIO()
    torch.save({"args": Namespace(num_layers=2, shape=torch.Size([1])), "iteration": 3}, file)
    return [file.getvalue()]


def weights_seeds() -> list[bytes]:
    entry = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    header = json.dumps({"w": entry, "__metadata__": {"format": "pt"}}).encode()
    return [struct.pack("<Q", len(header)) + header + bytes(8)]


def manifest_seeds() -> list[bytes]:
    entry = {"bytes": 16, "sha256": "0" * 64}
    return [json.dumps({"format": 1, "files": {"__0_0.distcp": entry, "../x": entry}}).encode()]


class Reader(NamedTuple):
    """A harness, the errors that it may end in, and what makes its first inputs."""

    harness: Callable[[bytes, Path], None]
    named: tuple[type[Exception], ...]
    seeds: Callable[[], list[bytes]]


READERS = {
    "text": Reader(text, (BrokenLineError,), text_seeds),
    "index": Reader(index, (ValueError,), index_seeds),
    "recipe": Reader(recipe, (RecipeError,), recipe_seeds),
    "metadata": Reader(metadata, (ConversionError,), metadata_seeds),
    "arguments": Reader(arguments, (ConversionError,), arguments_seeds),
    "weights": Reader(weights, (ConversionError,), weights_seeds),
    "manifest": Reader(manifest, (), manifest_seeds),
}


def seeds_of(name: str) -> list[bytes]:
    """Made and kept inputs of a reader."""
    kept = sorted((CORPUS / name).glob("*"))
    return [*READERS[name].seeds(), *(path.read_bytes() for path in kept)]


def execute(name: str, data: bytes, folder: Path) -> None:
    """Run a harness; returns for named errors, raises for all others."""
    reader = READERS[name]
    try:
        reader.harness(data, folder)
    except reader.named as error:
        # Plain ValueError is also what a careless int() raises: only our own words count.
        if type(error) is ValueError and str(folder) not in str(error):
            raise AssertionError(f"a ValueError that names no file: {error}") from error


_WORDS = [
    *(b"\0", b"\xff" * 8, b"\x7f" + b"\xff" * 7, b"\0" * 8, b"\x80"),
    *(b"-1", b"1e999", b"NaN", b"null"),
    *(b"{", b"}", b"[", b"]", b'"', b"\\u0000", b"\\ud800", b"\n", b"../", b"&a ", b"*a", b"!!x "),
    *(b"(", b"t", b"R", b"b", b".", b"\x94", b"c\n\n", b"\x8e", b"0" * 40),
]


def mutated(rng: random.Random, seeds: list[bytes]) -> bytes:
    """One of the seeds after one to six changes: new inputs where no coverage guides."""
    data = bytearray(rng.choice(seeds))
    for _ in range(rng.randint(1, 6)):
        at = rng.randrange(len(data) + 1)
        end = min(len(data), at + rng.choice((1, 1, 2, 4, 8, 40)))
        change = rng.randrange(6)
        if change == 0 and at < len(data):
            data[at] ^= 1 << rng.randrange(8)
        elif change == 1:
            data[at:end] = rng.choice(_WORDS)
        elif change == 2:
            data[at:at] = rng.choice(_WORDS)
        elif change == 3:
            del data[at:end]
        elif change == 4:
            other = rng.choice(seeds)
            start = rng.randrange(len(other) + 1)
            data[at:at] = other[start : start + rng.randint(0, 60)]
        else:
            del data[at:]
    return bytes(data)
