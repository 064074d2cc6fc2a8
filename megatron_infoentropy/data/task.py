"""What one run of preprocessing is asked for, and how to tell that an earlier one did just that."""

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from megatron_infoentropy import __version__
from megatron_infoentropy.data.blocks import UnfitDocumentsError
from megatron_infoentropy.data.indexed import bin_path, idx_path, token_dtype
from megatron_infoentropy.data.journal import InputTally
from megatron_infoentropy.data.manifest import (
    MANIFEST,
    InputFacts,
    Manifest,
    TokenizerFacts,
    load_manifest,
)
from megatron_infoentropy.data.options import Options
from megatron_infoentropy.data.tokenizer import LoadedTokenizer
from megatron_infoentropy.data.writer import file_sha256

_SAMPLES, _SAMPLE_BYTES = 8, 1 << 16


class Input(NamedTuple):
    """A file, and what tells without reading all of it whether it is still the same one."""

    path: Path
    bytes: int
    modified_ns: int
    changed_ns: int  # also by a rename that keeps the time of modification
    samples: str  # SHA-256 of some of its bytes


def input_of(path: Path) -> Input:
    """Look at a file as it is now; all of a small one, 64 KiB at eight places of a large one."""
    digest, status = hashlib.sha256(), path.stat()
    last = max(status.st_size - _SAMPLE_BYTES, (_SAMPLES - 1) * _SAMPLE_BYTES)
    with path.open("rb") as file:
        for sample in range(_SAMPLES):
            file.seek(sample * last // (_SAMPLES - 1))
            digest.update(file.read(_SAMPLE_BYTES))
    times = (status.st_mtime_ns, status.st_ctime_ns)
    return Input(path, status.st_size, *times, digest.hexdigest())


@dataclass(frozen=True)
class Task:
    """Make `output` of `inputs`; `shard` is (i, n) where that is one part of n of `shards_of`."""

    inputs: Sequence[Input]
    output: Path
    loaded: LoadedTokenizer
    options: Options
    shard: tuple[int, int] | None
    shards_of: str

    def job(self) -> dict[str, Any]:
        """What must be the same for a run to go on where another ended; plain JSON."""
        return {
            "inputs": [
                [str(each.path.resolve()), each.bytes, each.modified_ns, each.samples]
                for each in self.inputs
            ],
            "tokenizer": self.loaded.sha256,
            "list of files": self.shards_of,
            "options": asdict(self.options),
            "versions": self.versions(),
        }

    def versions(self) -> dict[str, str]:
        """What the ids depend on."""
        packages = ("tokenizers", "transformers")
        return {"megatron-infoentropy": __version__} | {name: version(name) for name in packages}

    def is_done(self) -> bool:
        """Whether `output` is what this would make: of these inputs, tokenizer and options."""
        if not (self.output / MANIFEST).is_file():
            return False
        try:
            found = load_manifest(self.output)
        except ValueError:
            return False
        made_ns = (self.output / MANIFEST).stat().st_mtime_ns
        return (
            len(found.inputs) == len(self.inputs)
            and found.tokenizer.sha256 == self.loaded.sha256
            and found.options == self.options
            and (found.shard, found.shards_of) == (self.shard, self.shards_of)
            and all(_is_whole(found, name) for name in found.domains)
            and all(
                _is_that_of(facts, each, made_ns)
                for facts, each in zip(found.inputs, self.inputs, strict=True)
            )
        )

    def require_unchanged(self, number: int, sha256: str) -> None:
        """Check that an input still has the content that was read.

        Raises:
            UnfitDocumentsError: it was written to or replaced since the task began.
        """
        before = self.inputs[number]
        if before.path.stat().st_ctime_ns == before.changed_ns:
            return
        now = input_of(before.path)
        same = (now.bytes, now.samples) == (before.bytes, before.samples)
        if not same or file_sha256(now.path) != sha256:
            raise UnfitDocumentsError(
                f"{now.path} changed while it was read (it had {before.bytes} bytes and has "
                f"{now.bytes}): give the command again when nothing writes to it any more"
            )

    def manifest(
        self, folder: Path, engine: str, lines: Sequence[int], tallies: Sequence[InputTally]
    ) -> Manifest:
        """The manifest of the finished run, still without domains."""
        loaded = self.loaded
        added = loaded.added_around() if self.options.special_tokens else None
        start_ids = tuple(added[0]) if added else ()
        return Manifest(
            folder=folder,
            tokenizer=TokenizerFacts(loaded.sha256, loaded.vocab_size, loaded.eod_id, start_ids),
            dtype=token_dtype(loaded.vocab_size).name,
            append_eod=self.options.append_eod,
            domains={},
            options=self.options,
            versions=self.versions(),
            engine=engine,
            inputs=tuple(
                InputFacts(each.path.name, each.bytes, count, **asdict(tally), samples=each.samples)
                for each, count, tally in zip(self.inputs, lines, tallies, strict=True)
            ),
            shard=self.shard,
            shards_of=self.shards_of,
        )


def _is_that_of(facts: InputFacts, file: Input, made_ns: int) -> bool:
    """Whether a file is the one that a manifest tells of; if it changed since then, by all of it.

    Where an older version recorded no content, name and size decide.
    """
    if (facts.name, facts.bytes) != (file.path.name, file.bytes):
        return False
    if not facts.sha256 or facts.samples != file.samples:
        return not facts.sha256
    return file.changed_ns < made_ns or file_sha256(file.path) == facts.sha256


def _is_whole(manifest: Manifest, domain: str) -> bool:
    path, size = bin_path(manifest.prefix(domain)), token_dtype(manifest.tokenizer.vocab_size)
    expected = manifest.domains[domain].tokens * size.itemsize
    index = idx_path(manifest.prefix(domain))
    return path.is_file() and path.stat().st_size == expected and index.is_file()
