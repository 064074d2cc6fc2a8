"""A preprocessed token dataset as the evaluation sees it: which documents are scored, how weighed.

A dataset is domains of documents of token ids; a selection of these is scored. In what shares the
domains enter the weighted average:

    auto        the training data's tokens, where the counts' folder tells them; else as scored
    scored      the scored tokens: the weighted average is that over all tokens
    paper       the sampling rates published with the paper's code
    FILE.json   {"domain": weight, ...}, any scale
"""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import quote

import numpy as np
from numpy.typing import NDArray

from megatron_infoentropy.data.blend import PAPER_WEIGHTS, shares_of
from megatron_infoentropy.data.indexed import IndexedReader, Integers, bin_path, require_whole
from megatron_infoentropy.data.manifest import MANIFEST, load_manifest


@dataclass(frozen=True)
class Domain:
    """The documents of one domain; `lengths` int64 [documents], `bytes` of UTF-8 text.

    The first `skipped` tokens of every document, its start token, count as no part of it.
    """

    name: str
    reader: IndexedReader
    lengths: NDArray[np.int64]
    bytes: int
    skipped: int = 0

    def read(self, document: int, length: int) -> Integers:
        """Return the first so many token ids of one document."""
        return self.reader[document][self.skipped : self.skipped + length]


@dataclass(frozen=True)
class TokenDataset:
    """All domains of a dataset folder, and the tokenizer they were written with.

    A model reads the ids `context` in front of a document: the start token where the documents have
    one, else the end-of-document token.
    """

    domains: list[Domain]
    tokenizer_sha256: str
    vocab_size: int
    context: tuple[int, ...]
    state: str  # changes with the files: manifest, sizes and times
    empty_documents: int


def tokenise_folder(text: Path, tokenizer: Path, output: Path) -> dict[str, Path]:
    """Make a dataset of one domain of every .jsonl file below a folder, named as the file.

    Args:
        text: the folder; files may be compressed (.gz, .zst).
        tokenizer: of the model that will score them.
        output: folder for the datasets; those that are there already stay.

    Returns:
        {domain: dataset}, for `open_dataset`.

    Raises:
        ValueError: no such file, or two of one name; or a file without a document.
    """
    from megatron_infoentropy.data.manifest import DataOptions
    from megatron_infoentropy.data.preprocess import preprocess

    made: dict[str, Path] = {}
    for path in sorted(path for path in text.rglob("*.jsonl*") if path.is_file()):
        name, _, compression = path.relative_to(text).as_posix().rpartition(".jsonl")
        if compression not in ("", ".gz", ".zst"):
            continue
        if name in made:
            raise ValueError(f"{text} holds {name}.jsonl twice, compressed and not: remove one")
        made[name] = output / quote(name, safe=" ")
        workers = len(os.sched_getaffinity(0))
        options = DataOptions(split_by=None)
        preprocess([path], tokenizer, made[name], options=options, workers=workers, overwrite=True)
    if not made:
        raise ValueError(f"expected .jsonl, .jsonl.gz or .jsonl.zst files below {text}, found none")
    return made


def open_dataset(data: Path | Mapping[str, Path], *, packed: bool = False) -> TokenDataset:
    """Open the dataset that preprocessing wrote into a folder, or several of one domain each.

    packed: documents will follow one another, as in training: then a start token follows the
    document before it, and is a token of the document like any other.

    Raises:
        ValueError: the manifest or a domain's .bin/.idx is missing, damaged or cut off.
    """
    if isinstance(data, Path):
        return _open_folder(data, packed=packed)
    parts = {name: _open_folder(folder, packed=packed) for name, folder in data.items()}
    state = hashlib.sha256("".join(part.state for part in parts.values()).encode())
    return replace(
        next(iter(parts.values())),
        domains=[replace(one, name=name) for name, part in parts.items() for one in part.domains],
        state=state.hexdigest(),
        empty_documents=sum(part.empty_documents for part in parts.values()),
    )


def _open_folder(folder: Path, *, packed: bool) -> TokenDataset:
    manifest = load_manifest(folder)
    tokenizer = manifest.tokenizer
    start = () if packed or manifest.options.piece_tokens else tokenizer.start_ids
    domains = []
    for name, facts in manifest.domains.items():
        require_whole(manifest.prefix(name), facts.tokens)
        reader = IndexedReader(manifest.prefix(name))
        lengths = np.maximum(reader.lengths - len(start), 0)
        domains.append(Domain(name, reader, lengths, facts.bytes, len(start)))
    files = [folder / MANIFEST, *(bin_path(manifest.prefix(name)) for name in manifest.domains)]
    state = hashlib.sha256((folder / MANIFEST).read_bytes())
    for status in (path.stat() for path in files):
        state.update(f"{status.st_size} {status.st_mtime_ns} ".encode())
    empty = sum(int((domain.lengths == 0).sum()) for domain in domains)
    context = start or (tokenizer.eod_id,)
    return TokenDataset(
        domains, tokenizer.sha256, tokenizer.vocab_size, context, state.hexdigest(), empty
    )


@dataclass(frozen=True)
class Selection:
    """The documents to score, in the order of their domain and index; int64 arrays [documents].

    `domain` and `document` name the document in the dataset, `length` the tokens scored of it,
    counted from its start, at least one. `complete[i]` says whether all of domain i is selected.
    """

    domain: NDArray[np.int64]
    document: NDArray[np.int64]
    length: NDArray[np.int64]
    complete: list[bool]

    def __len__(self) -> int:
        return len(self.domain)

    def read(self, dataset: TokenDataset, rows: slice) -> list[NDArray[np.int64]]:
        """Return the scored tokens of the documents `rows`, which are of one domain."""
        domain = dataset.domains[self.domain[rows.start]]
        places = zip(self.document[rows], self.length[rows], strict=True)
        return [domain.read(int(n), int(length)).astype(np.int64) for n, length in places]


def select_documents(dataset: TokenDataset, max_tokens: int | None = None) -> Selection:
    """Select every document, or with `max_tokens` a sample of that many tokens.

    The sample takes from each domain its share of the dataset, in a fixed shuffled order of
    documents, and cuts the last one short. It is the same for every model. Documents without a
    token (preprocessing keeps them, as Megatron does) have nothing to score and are left out.

    Raises:
        ValueError: max_tokens is too small to take one token of each domain, or a domain has none.
    """
    sizes = [int(domain.lengths.sum()) for domain in dataset.domains]
    if max_tokens is not None and max_tokens < len(dataset.domains):
        raise ValueError(
            f"max_tokens must be at least one token for each of the {len(dataset.domains)} "
            f"domains, got {max_tokens}"
        )
    parts, complete = [], []
    for index, (domain, size) in enumerate(zip(dataset.domains, sizes, strict=True)):
        if not size:
            raise ValueError(
                f"domain {domain.name!r} has {len(domain.lengths)} documents and no token, so it "
                "has no perplexity: leave it out when preprocessing"
            )
        budget = size
        if max_tokens is not None and max_tokens < sum(sizes):
            budget = max(1, size * max_tokens // sum(sizes))
        documents, lengths = _within(domain.lengths, budget)
        parts.append((np.full(len(documents), index, dtype=np.int64), documents, lengths))
        complete.append(int(lengths.sum()) == size)
    domains, numbers, lengths = (np.concatenate(column) for column in zip(*parts, strict=True))
    return Selection(domains, numbers, lengths, complete)


def _within(lengths: NDArray[np.int64], budget: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return documents and the tokens taken of each, `budget` in all, in ascending order."""
    order = np.arange(len(lengths))
    if budget < lengths.sum():
        order = np.random.default_rng(0).permutation(len(lengths))
    before = np.cumsum(lengths[order]) - lengths[order]
    taken = np.clip(budget - before, 0, lengths[order])
    chosen = np.flatnonzero(taken)
    chosen = chosen[np.argsort(order[chosen])]
    return order[chosen], taken[chosen]


def places_sha256(
    dataset: TokenDataset, selection: Selection, band_of_token: NDArray[np.int8]
) -> str:
    """Return the SHA-256 of the domains' names, of what is scored, and of every token id's band."""
    digest = hashlib.sha256(band_of_token.tobytes())
    for domain in dataset.domains:
        digest.update(f"{len(domain.name)}:{domain.name}".encode())
    for place in (selection.domain, selection.document, selection.length):
        digest.update(place.astype("<i8").tobytes())
    return digest.hexdigest()


def domain_weights(
    kind: str, scored: Mapping[str, int], token_counts: Path
) -> tuple[dict[str, float], str]:
    """Return the scored domains' weights, of a finite sum, and what they are in words.

    Args:
        kind: see the module's text.
        scored: the domains and their scored tokens.
        token_counts: the training data's counts, beside which its manifest may lie.

    Raises:
        ValueError: weights of no known kind, negative, all 0, or that lack a domain.
    """
    as_scored = {name: float(tokens) for name, tokens in scored.items()}
    if kind == "scored":
        return as_scored, "the scored tokens"
    if kind == "auto":
        trained: dict[str, float] = {}
        if (token_counts.parent / MANIFEST).is_file():
            domains = load_manifest(token_counts.parent).domains
            trained = {name: float(facts.tokens) for name, facts in domains.items()}
        if scored.keys() <= trained.keys():
            return _checked(trained, scored, kind), "tokens of the training data"
        return as_scored, "the scored tokens (the training data's domains are not known)"
    if kind == "paper":
        return _checked(PAPER_WEIGHTS, scored, kind), "sampling rates of the paper's code"
    if not kind.endswith(".json"):
        raise ValueError(
            f"domain weights must be auto, scored, paper or a .json file, got {kind!r}"
        )
    try:
        given = json.loads(Path(kind).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"no readable domain weights in {kind}: {error}") from error
    return _checked(given, scored, kind), Path(kind).name


def _checked(given: object, scored: Mapping[str, int], kind: str) -> dict[str, float]:
    if not isinstance(given, Mapping) or any(name not in given for name in scored):
        raise ValueError(
            f"the weights of {kind!r} must be an object with a number for each of {sorted(scored)}"
        )
    return shares_of({name: given[name] for name in scored})
