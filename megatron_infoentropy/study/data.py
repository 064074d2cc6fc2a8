"""What a study's runs train on and are scored on: made below OUTPUT/data, or named by the study."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from megatron_infoentropy.data.manifest import MANIFEST
from megatron_infoentropy.study.ledger import (
    Given,
    Step,
    digest_of,
    hash_files,
    hashes_of,
    read_given,
    read_progress,
    run_steps,
)
from megatron_infoentropy.study.plan import SPLITS, Study, StudyError

FOLDER = "data"
_SUFFIXES = (".jsonl", ".jsonl.zst", ".jsonl.gz")


@dataclass(frozen=True)
class Places:
    """Folders, as `infoentropy train` wants them."""

    tokens: Path
    tokenizer: Path


def places(study: Study, output: Path) -> Places:
    """Where data and tokenizer are, or will be."""
    made = output / FOLDER
    return Places(study.data.tokens or made / "tokens", study.data.tokenizer or made / "tokenizer")


def prepare(study: Study, output: Path) -> str:
    """Make what is not there; returns the digest of the data."""
    made = find_digest(study, output)  # runs side by side may all look, without a lock
    if made is not None:
        return made
    given = _given(study, output)
    return run_steps(output / FOLDER, _steps(study, output), _digest_of_given(given), given)


def find_digest(study: Study, output: Path) -> str | None:
    """The digest of the data, None while it is not made."""
    if study.data.tokens is not None:
        return _digest_of_tokens(study.data.tokens)
    steps = _steps(study, output)
    after = _digest_of_given(_given(study, output))
    progress = read_progress(output / FOLDER, steps, after)
    return progress.digest if len(progress.done) == len(steps) else None


def _digest_of_tokens(tokens: Path) -> str:
    """Of the manifests, which hold the checksums of everything."""
    names = tuple(f"{split}/{MANIFEST}" for split in SPLITS)
    missing = [name for name in names if not (tokens / name).is_file()]
    if missing:
        raise StudyError(f"data: {tokens} lacks {', '.join(missing)}; `infoentropy preprocess`")
    return digest_of(hashes_of(hash_files(tokens, names, known={})))


def _given(study: Study, output: Path) -> Given:
    """The files that the study names and does not make, by their folder."""
    known, given = read_given(output / FOLDER), Given()
    wanted: list[tuple[Path, tuple[str, ...]]] = []
    if study.data.text is not None:
        texts = _texts(study.data.text).values()
        wanted.append((study.data.text, tuple(path.name for path in texts)))
    if study.data.tokenizer is not None:
        wanted.append((study.data.tokenizer, (".",)))
    for folder, names in wanted:
        given[str(folder)] = hash_files(folder, names, known.get(str(folder), {}))
    return given


def _digest_of_given(given: Given) -> str:
    return digest_of([hashes_of(records) for records in given.values()])


def _texts(folder: Path) -> dict[str, Path]:
    found = {}
    for split in SPLITS:
        files = [path for suffix in _SUFFIXES if (path := folder / f"{split}{suffix}").is_file()]
        if not files:
            raise StudyError(f"data: {folder} has no {split}{' or '.join(_SUFFIXES)}")
        found[split] = files[0]
    return found


def _steps(study: Study, output: Path) -> list[Step]:
    made, data = output / FOLDER, study.data
    steps: list[Step] = []
    make: Callable[[], None]
    if data.corpus_megabytes is not None:
        make = partial(_corpus, made / "corpus", data.corpus_megabytes)
        steps.append(Step("corpus", data.corpus_megabytes, ("corpus",), make))
    text = data.text or made / "corpus"
    if data.vocab_size is not None:
        make = partial(_tokenizer, text, made / "tokenizer", data.vocab_size)
        steps.append(Step("tokenizer", data.vocab_size, ("tokenizer",), make))
    tokenizer = data.tokenizer or made / "tokenizer"
    for split in SPLITS:
        make = partial(_tokens, text, split, tokenizer, made / "tokens" / split)
        steps.append(Step(f"tokens {split}", None, (f"tokens/{split}",), make))
    return steps


def _corpus(output: Path, megabytes: float) -> None:
    from megatron_infoentropy.data.corpus import build_corpus

    build_corpus(output, megabytes=megabytes, overwrite=True)


def _tokenizer(text: Path, output: Path, vocab_size: int) -> None:
    from megatron_infoentropy.data.tokenizer import train_tokenizer

    train_tokenizer(_texts(text)["train"], output, vocab_size=vocab_size, overwrite=True)


def _tokens(text: Path, split: str, tokenizer: Path, output: Path) -> None:
    from megatron_infoentropy.data.preprocess import preprocess

    workers = len(os.sched_getaffinity(0))
    preprocess([_texts(text)[split]], tokenizer, output, workers=workers, overwrite=True)
