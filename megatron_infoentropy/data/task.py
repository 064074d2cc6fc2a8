"""What one run of preprocessing is asked for, and how to tell that an earlier one did just that."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from megatron_infoentropy import __version__
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


@dataclass(frozen=True)
class Task:
    """Make `output` of `inputs`; `shard` is (i, n) where that is one part of n."""

    inputs: Sequence[Path]
    output: Path
    loaded: LoadedTokenizer
    options: Options
    shard: tuple[int, int] | None

    def job(self) -> dict[str, Any]:
        """What must be the same for a run to go on where another ended; plain JSON."""
        return {
            "inputs": [
                [str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns]
                for path in self.inputs
            ],
            "tokenizer": self.loaded.sha256,
            "options": asdict(self.options),
            "versions": self.versions(),
        }

    def versions(self) -> dict[str, str]:
        """What the ids depend on."""
        packages = ("tokenizers", "transformers")
        return {"megatron-infoentropy": __version__} | {name: version(name) for name in packages}

    def is_done(self) -> bool:
        """Whether `output` is what this would make, as far as names and sizes tell."""
        if not (self.output / MANIFEST).is_file():
            return False
        try:
            found = load_manifest(self.output)
        except ValueError:
            return False
        asked = [(path.name, path.stat().st_size) for path in self.inputs]
        return (
            [(facts.name, facts.bytes) for facts in found.inputs] == asked
            and found.tokenizer.sha256 == self.loaded.sha256
            and found.options == self.options
            and found.shard == self.shard
            and all(_is_whole(found, name) for name in found.domains)
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
                InputFacts(path.name, path.stat().st_size, count, **asdict(tally))
                for path, count, tally in zip(self.inputs, lines, tallies, strict=True)
            ),
            shard=self.shard,
        )


def _is_whole(manifest: Manifest, domain: str) -> bool:
    path, size = bin_path(manifest.prefix(domain)), token_dtype(manifest.tokenizer.vocab_size)
    expected = manifest.domains[domain].tokens * size.itemsize
    index = idx_path(manifest.prefix(domain))
    return path.is_file() and path.stat().st_size == expected and index.is_file()
