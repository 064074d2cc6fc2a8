"""`manifest.json`: what a token dataset folder holds, for the rooms that read one.

    DIR/<slug>.bin, DIR/<slug>.idx   one Megatron dataset per domain
    DIR/token_counts.npy             int64 [domains, vocab_size], occurrences of every token id
    DIR/manifest.json                this

The rows of the counts are in the order of the manifest's domains, which is that of their names.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

FORMAT = 1
MANIFEST = "manifest.json"
TOKEN_COUNTS = "token_counts.npy"


@dataclass(frozen=True)
class TokenizerFacts:
    """Which tokenizer the ids belong to; `sha256` is that of its tokenizer.json."""

    sha256: str
    vocab_size: int
    eod_id: int


@dataclass(frozen=True)
class DomainFacts:
    """One domain: `bytes` of UTF-8 text became `tokens` ids (end-of-document ids included)."""

    prefix: str
    documents: int
    tokens: int
    bytes: int


@dataclass(frozen=True)
class Manifest:
    """The dataset in `folder`; `dtype` of the ids is "uint16" or "int32"."""

    folder: Path
    tokenizer: TokenizerFacts
    dtype: str
    append_eod: bool
    domains: dict[str, DomainFacts]

    def prefix(self, domain: str) -> Path:
        """The domain's dataset without `.bin` or `.idx`, as Megatron's `--data-path` wants it."""
        return self.folder / self.domains[domain].prefix

    def token_counts(self) -> npt.NDArray[np.int64]:
        """Occurrences of every id, int64 [domains in the order of `domains`, vocab_size]."""
        counts: npt.NDArray[np.int64] = np.load(self.folder / TOKEN_COUNTS)
        return counts

    def save(self) -> None:
        """Write `manifest.json` into the folder."""
        content = {
            "format": FORMAT,
            "tokenizer": asdict(self.tokenizer),
            "dtype": self.dtype,
            "append_eod": self.append_eod,
            "domains": {name: asdict(facts) for name, facts in self.domains.items()},
            "token_counts": TOKEN_COUNTS,
        }
        (self.folder / MANIFEST).write_text(json.dumps(content, indent=2) + "\n")


def load_manifest(folder: Path) -> Manifest:
    """Read the manifest of a token dataset folder.

    Raises:
        ValueError: there is none, or it is not of the format this version writes.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise ValueError(
            f"{folder} is no token dataset: it has no {MANIFEST}; make one with "
            "`infoentropy preprocess`"
        )
    try:
        content = json.loads(path.read_text())
        found = content["format"]
        if found != FORMAT:
            raise ValueError(f"expected format {FORMAT}, got {found!r}; preprocess again")
        return _parse(folder, content)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        what = f"no entry {error}" if isinstance(error, KeyError) else str(error)
        raise ValueError(f"{path} can not be used: {what}") from error


def _parse(folder: Path, content: dict[str, Any]) -> Manifest:
    return Manifest(
        folder=folder,
        tokenizer=TokenizerFacts(**content["tokenizer"]),
        dtype=content["dtype"],
        append_eod=content["append_eod"],
        domains={name: DomainFacts(**facts) for name, facts in content["domains"].items()},
    )
