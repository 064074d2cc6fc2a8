"""`manifest.json`: what a token dataset folder holds and what it was made of.

    DIR/<slug>.bin, DIR/<slug>.idx   one Megatron dataset per domain
    DIR/token_counts.npy             int64 [domains, vocab_size], occurrences of every token id
    DIR/rejected.tsv                 file, line and reason of every line that was skipped, if any
    DIR/manifest.json                this

The rows of the counts are in the order of the manifest's domains, which is that of their names.
Nothing in it depends on the machine, the day or the number of workers.
"""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from megatron_infoentropy.files import write_whole

PILE_DOMAIN = "meta.pile_set_name"
AUTO = "auto"


@dataclass(frozen=True)
class DataOptions:
    """The choices that decide which bytes preprocessing writes; the defaults are Megatron's own.

    Attributes:
        append_eod: end every document that has a token with the end-of-document token.
        special_tokens: keep what the tokenizer adds itself, such as a start token. False is
            Megatron's --tokenizer-hf-no-include-special-tokens.
        text_key: where a record has its text (Megatron's --json-keys).
        split_by: where a record names its domain, dots leading into objects; None for one dataset.
            AUTO is PILE_DOMAIN for the documents that have it, and one dataset for the others.
        piece_tokens, piece_documents: `pack` cut so many documents in a row into such pieces; 0
            where documents are whole.
    """

    append_eod: bool = True
    special_tokens: bool = True
    text_key: str = "text"
    split_by: str | None = AUTO
    piece_tokens: int = 0
    piece_documents: int = 0


DEFAULT_OPTIONS = DataOptions()


FORMAT = 3
MANIFEST = "manifest.json"
TOKEN_COUNTS = "token_counts.npy"
REJECTED = "rejected.tsv"
OUTPUT_FILES = ("*.bin", "*.idx", MANIFEST, TOKEN_COUNTS, REJECTED)


@dataclass(frozen=True)
class TokenizerFacts:
    """The tokenizer that the ids belong to; `sha256` is its `tokenizer_digest`.

    `start_ids` begin every document, where the tokenizer puts a start token before a text.
    """

    sha256: str
    vocab_size: int
    eod_id: int
    start_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "start_ids", tuple(self.start_ids))  # JSON has lists


class Span(NamedTuple):
    """So many bytes of a `.bin` behind those of the span before, and their SHA-256."""

    bytes: int
    sha256: str


@dataclass
class DomainFacts:
    """The sizes of one domain: `bytes` of UTF-8 text, and `tokens` ids with the ends of documents.

    `empty` of the `documents` have no token; `rejected` are lines that name this domain but hold no
    document and were skipped. The ids of one input are a span of the `.bin`, so that datasets can
    be joined, and checked in parallel, without a new checksum of all bytes.
    """

    prefix: str
    documents: int
    tokens: int
    bytes: int
    empty: int = 0
    rejected: int = 0
    bin_spans: list[Span] = field(default_factory=list)
    idx_sha256: str = ""

    def __post_init__(self) -> None:
        self.bin_spans = [Span(*each) for each in self.bin_spans]  # JSON has lists


@dataclass
class InputFacts:
    """The counts of one input file's lines: documents, rejected, or blank (at the file's end).

    `sha256` is that of its bytes, `samples` that of some of them (`preprocess.input_of`).
    """

    name: str
    bytes: int
    lines: int
    documents: int
    empty: int
    rejected: int
    blank: int
    sha256: str = ""
    samples: str = ""


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The dataset in `folder`; `dtype` of the ids is "uint16" or "int32".

    `engine` made the ids: hf, or another with its version; of merged parts all, with ", " between.
    `left_out` are the domains none of whose documents has a token, with their documents: Megatron
    can not open an empty dataset. `shard` is (i, n) for one part of a larger dataset, and
    `shards_of` then a digest of what all parts share out among them. `token_counts` names the file
    of the counts.
    """

    folder: Path
    versions: dict[str, str] = field(default_factory=dict)
    engine: str = "hf"
    options: DataOptions = field(default_factory=DataOptions)
    tokenizer: TokenizerFacts
    dtype: str
    append_eod: bool
    shard: tuple[int, int] | None = None
    shards_of: str = ""
    inputs: tuple[InputFacts, ...] = ()
    domains: dict[str, DomainFacts]
    left_out: dict[str, int] = field(default_factory=dict)
    token_counts: str = TOKEN_COUNTS
    token_counts_sha256: str = ""

    def prefix(self, domain: str) -> Path:
        """Return a dataset's path without suffix, as Megatron's `--data-path` wants it."""
        return self.folder / self.domains[domain].prefix

    def save(self) -> None:
        """Write `manifest.json` into the folder."""
        content = {"format": FORMAT} | asdict(self)
        del content["folder"]
        write_whole(self.folder / MANIFEST, (json.dumps(content, indent=2) + "\n").encode())


def load_manifest(folder: Path) -> Manifest:
    """Read the manifest of a token dataset folder.

    Raises:
        ValueError: there is none, or it is of no format that this version knows.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise ValueError(
            f"{folder} is no token dataset: it has no {MANIFEST}; make one with "
            "`infoentropy preprocess`"
        )
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["format"] != FORMAT:
            raise ValueError(
                f"expected format {FORMAT}, got {content['format']!r}; preprocess again"
            )
        return _parse(folder, content)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        what = f"no entry {error}" if isinstance(error, KeyError) else str(error)
        raise ValueError(f"{path} can not be used: {what}") from error


def _parse(folder: Path, content: dict[str, Any]) -> Manifest:
    shard = content["shard"]
    for facts in content["domains"].values():
        prefix = facts["prefix"]
        if prefix in ("", ".", "..") or "/" in prefix or "\0" in prefix:
            raise ValueError(f"the prefix {prefix!r} is no name of a file in this folder")
        size = facts["tokens"] * np.dtype(content["dtype"]).itemsize
        if sum(span[0] for span in facts["bin_spans"]) != size:
            raise ValueError(f"the spans of {prefix}.bin do not add up to its {size} bytes")
    return Manifest(
        folder=folder,
        tokenizer=TokenizerFacts(**content["tokenizer"]),
        dtype=content["dtype"],
        append_eod=content["append_eod"],
        domains={name: DomainFacts(**facts) for name, facts in content["domains"].items()},
        options=DataOptions(**content["options"]),
        versions=content["versions"],
        engine=content["engine"],
        inputs=tuple(InputFacts(**facts) for facts in content["inputs"]),
        left_out=content["left_out"],
        shard=None if shard is None else (shard[0], shard[1]),
        shards_of=content["shards_of"],
        token_counts_sha256=content["token_counts_sha256"],
    )
