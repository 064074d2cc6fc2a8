"""What the fuzzers call: one function a reader, from any bytes to nothing or a named error.

Any other exception is a finding. `folder` is where a reader finds its file, in memory at best.
"""

import io
from collections.abc import Callable
from pathlib import Path

from megatron_infoentropy.checkpoints import MANIFEST, find_damage
from megatron_infoentropy.convert.distcp import DistcpReader
from megatron_infoentropy.convert.errors import ConversionError
from megatron_infoentropy.convert.hf_weights import HuggingFaceWeights
from megatron_infoentropy.convert.unpickle import load_object
from megatron_infoentropy.data.blocks import SUFFIXES, BrokenLineError, Keys
from megatron_infoentropy.data.indexed import IndexedReader
from megatron_infoentropy.data.jsonl import read_documents
from megatron_infoentropy.launch.recipe import (
    RecipeError,
    load_plan,
    load_recipe,
    to_command_line,
)


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


Harness = Callable[[bytes, Path], None]
HARNESSES: dict[str, tuple[Harness, tuple[type[Exception], ...]]] = {
    "text": (text, (BrokenLineError,)),
    "index": (index, (ValueError,)),
    "recipe": (recipe, (RecipeError,)),
    "metadata": (metadata, (ConversionError,)),
    "arguments": (arguments, (ConversionError,)),
    "weights": (weights, (ConversionError,)),
    "manifest": (manifest, ()),
}


def execute(name: str, data: bytes, folder: Path) -> None:
    """Run a harness; returns for named errors, raises for all others."""
    harness, named = HARNESSES[name]
    try:
        harness(data, folder)
    except named as error:
        # Plain ValueError is also what a careless int() raises: only our own words count.
        if type(error) is ValueError and str(folder) not in str(error):
            raise AssertionError(f"a ValueError that names no file: {error}") from error
