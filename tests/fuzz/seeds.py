"""The first inputs of every fuzzer, small and valid; in corpus/ is what was found since."""

import gzip
import io
import json
import pickle
import struct
from argparse import Namespace
from pathlib import Path

import torch
import zstandard
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

CORPUS = Path(__file__).parent / "corpus"
LINES = b'{"text": "a \\u00e4", "meta": {"pile_set_name": "A"}}\n{"text": "", "meta": {}}\n'


def text() -> list[bytes]:
    plain = [LINES, b"", b"\n\n", b'{"text": 1}', LINES[:30], b'{"text": "\\ud800"}', b"[" * 50]
    packed = [zstandard.ZstdCompressor().compress(LINES), gzip.compress(LINES, mtime=0)]
    return [b"\0" + data for data in plain] + [b"\1" + packed[0], b"\2" + packed[1]]


def index() -> list[bytes]:
    head = struct.pack("<9sQBQQ", b"MMIDIDX\0\0", 1, 8, 2, 4)
    body = struct.pack("<2i2q4q", 3, 1, 0, 6, 0, 1, 1, 2)
    empty = struct.pack("<9sQBQQ", b"MMIDIDX\0\0", 1, 4, 0, 1) + bytes(8)
    return [head + body, empty, head, head[:20]]


def recipe() -> list[bytes]:
    return [
        b"model:\n  num-layers: 4\n  swiglu: true\n  betas: [0.9, 0.95]\nlaunch:\n  ranks: 2\n",
        b"a: &x {b: 1}\nc: *x\n",
        b"a: {b: 2026-01-01}\n",
        b"- a\n",
    ]


def metadata() -> list[bytes]:
    properties = TensorProperties(dtype=torch.float32)
    chunk = ChunkStorageMetadata(torch.Size([0, 0]), torch.Size([2, 3]))
    entry = TensorStorageMetadata(properties, torch.Size([2, 3]), [chunk])
    storage = {
        MetadataIndex("w", torch.Size([0, 0])): _info("__0_0.distcp", 0, 1000),
        MetadataIndex("common_state"): _info("__0_0.distcp", 1000, 10),
    }
    return [
        pickle.dumps(Metadata({"w": entry, "common_state": BytesStorageMetadata()}, {}, storage))
    ]


def _info(file: str, offset: int, length: int) -> object:
    from torch.distributed.checkpoint.filesystem import _StorageInfo

    return _StorageInfo(file, offset, length)


def arguments() -> list[bytes]:
    file = io.BytesIO()
    torch.save({"args": Namespace(num_layers=2, shape=torch.Size([1])), "iteration": 3}, file)
    return [file.getvalue()]


def weights() -> list[bytes]:
    entry = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    header = json.dumps({"w": entry, "__metadata__": {"format": "pt"}}).encode()
    return [struct.pack("<Q", len(header)) + header + bytes(8)]


def manifest() -> list[bytes]:
    entry = {"bytes": 16, "sha256": "0" * 64}
    return [json.dumps({"format": 1, "files": {"__0_0.distcp": entry, "../x": entry}}).encode()]


def seeds_of(name: str) -> list[bytes]:
    """Made and kept ones of a harness."""
    kept = sorted((CORPUS / name).glob("*")) if (CORPUS / name).is_dir() else []
    return [*globals()[name](), *(path.read_bytes() for path in kept)]
