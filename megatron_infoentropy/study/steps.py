"""The steps of a study: its data made below OUTPUT/data, and every run trained, exported, scored.

Each step writes a file or a folder of its own, which the ledger knows again.
"""

import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from megatron_infoentropy.data.manifest import MANIFEST
from megatron_infoentropy.launch.recipe import load_plan, load_recipe
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
from megatron_infoentropy.study.plan import SPLITS, Member, Study, StudyError, Tasks

FOLDER = "data"
CHECKPOINTS, CACHE = "checkpoints", "cache"
SCORES = ("evaluation.json", "evaluation.npz", "token_scores.npy")
_SUFFIXES = (".jsonl", ".jsonl.zst", ".jsonl.gz")
_LATEST = "latest_checkpointed_iteration.txt"


@dataclass(frozen=True)
class Places:
    """Folders, as `infoentropy train` wants them."""

    tokens: Path
    tokenizer: Path


def places(study: Study, output: Path) -> Places:
    """Return where data and tokenizer are, or will be."""
    made = output / FOLDER
    return Places(study.data.tokens or made / "tokens", study.data.tokenizer or made / "tokenizer")


def prepare(study: Study, output: Path) -> str:
    """Make the data that are not there; return their digest."""
    made = find_digest(study, output)  # runs side by side may all look, without a lock
    if made is not None:
        return made
    given = _given(study, output)
    return run_steps(output / FOLDER, _data_steps(study, output), _digest_of_given(given), given)


def find_digest(study: Study, output: Path) -> str | None:
    """Return the digest of the data, None while they are not made."""
    steps = _data_steps(study, output)
    after = _digest_of_given(_given(study, output))
    progress = read_progress(output / FOLDER, steps, after)
    return None if progress.left else progress.digest


def _given(study: Study, output: Path) -> Given:
    """Return the files that the study names and does not make, by their folder."""
    wanted: dict[Path, tuple[str, ...]] = {}
    if study.data.tokens is not None:
        wanted[study.data.tokens] = _manifests(study.data.tokens)
    if study.data.text is not None:
        wanted[study.data.text] = tuple(path.name for path in _texts(study.data.text).values())
    if study.data.tokenizer is not None:
        wanted[study.data.tokenizer] = (".",)
    known = read_given(output / FOLDER)
    return {
        str(folder): hash_files(folder, names, known.get(str(folder), {}))
        for folder, names in wanted.items()
    }


def _digest_of_given(given: Given) -> str:
    return digest_of([hashes_of(records) for records in given.values()])


def _manifests(tokens: Path) -> tuple[str, ...]:
    """Return the names of the manifests, which hold the checksums of everything."""
    names = tuple(f"{split}/{MANIFEST}" for split in SPLITS)
    missing = [name for name in names if not (tokens / name).is_file()]
    if missing:
        raise StudyError(f"data: {tokens} lacks {', '.join(missing)}; `infoentropy preprocess`")
    return names


def _texts(folder: Path) -> dict[str, Path]:
    texts = {}
    for split in SPLITS:
        files = [path for suffix in _SUFFIXES if (path := folder / f"{split}{suffix}").is_file()]
        if not files:
            raise StudyError(f"data: {folder} has no {split}{' or '.join(_SUFFIXES)}")
        texts[split] = files[0]
    return texts


def _data_steps(study: Study, output: Path) -> list[Step]:
    made, data = output / FOLDER, study.data
    if data.tokens is not None:
        return []
    text, tokenizer = data.text or made / "corpus", places(study, output).tokenizer
    steps: list[Step] = []
    make: Callable[[], None]
    if data.corpus_megabytes is not None:
        make = partial(_corpus, text, data.corpus_megabytes)
        steps.append(Step("corpus", data.corpus_megabytes, ("corpus",), make))
    if data.vocab_size is not None:
        make = partial(_tokenizer, text, tokenizer, data.vocab_size)
        steps.append(Step("tokenizer", data.vocab_size, ("tokenizer",), make))
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


def member_steps(study: Study, member: Member, output: Path) -> list[Step]:
    """Return what a run is made of, in order."""
    folder, where = output / member.name, places(study, output)
    recipe = {"flags": load_recipe(study.recipe), "plan": asdict(load_plan(study.recipe))}
    trained = [recipe, study.flags, member.loss, member.seed]
    steps = [
        Step("train", trained, ("run.json", "train.log", CHECKPOINTS),
             lambda: _train(study, member, where, folder)),
        Step("export", None, ("hf",), lambda: _export(where, folder)),
        Step("evaluate", asdict(study.scoring), SCORES,
             lambda: _evaluate(study, where, folder)),
    ]  # fmt: skip
    if study.tasks is not None:
        ask = partial(_ask, study.tasks, folder)
        steps.append(Step("tasks", _asked(study.tasks), ("tasks",), ask))
    return steps


def _asked(tasks: Tasks) -> dict[str, Any]:
    """Return what answers depend on: of a folder of tasks, also what its files hold."""
    asked = asdict(tasks)
    if tasks.folder is not None:
        hashes = hashes_of(hash_files(tasks.folder, (".",), known={}))
        # Asking compiles a task's own code.
        asked["files"] = {
            name: digest for name, digest in hashes.items() if "__pycache__" not in Path(name).parts
        }
    return asked


def _train(study: Study, member: Member, where: Places, folder: Path) -> None:
    from megatron_infoentropy.launch.job import TrainingJob
    from megatron_infoentropy.launch.train import build_command, train

    if not (folder / CHECKPOINTS / _LATEST).is_file():  # nothing to go on from
        shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)
        (folder / "train.log").unlink(missing_ok=True)
    # Runs side by side must not write one index cache; nor may one of older data be read.
    shutil.rmtree(folder / CACHE, ignore_errors=True)
    job = TrainingJob(
        study.recipe,
        where.tokens,
        where.tokenizer,
        folder,
        study.settings(member),
        extra_flags=("--data-cache-path", str(folder / CACHE)),
    )
    train(job, build_command(job))
    shutil.rmtree(folder / CACHE, ignore_errors=True)


def _export(where: Places, folder: Path) -> None:
    from megatron_infoentropy.convert import Proof, convert_checkpoint

    convert_checkpoint(
        folder / CHECKPOINTS,
        folder / "hf",
        tokenizer=where.tokenizer,
        overwrite=True,
        check=Proof(lambda said: None),
    )


def _evaluate(study: Study, where: Places, folder: Path) -> None:
    from megatron_infoentropy.evaluate.evaluation import UNFINISHED, UnfinishedEvaluationError
    from megatron_infoentropy.evaluate.perplexity import ScoringOptions, evaluate_model

    evaluate = partial(
        evaluate_model,
        folder / "hf",
        where.tokens / study.scoring.split,
        ScoringOptions(max_tokens=study.scoring.max_tokens, device=study.scoring.device),
        token_counts=where.tokens / "train" / "token_counts.npy",
        output=folder,
        overwrite=True,  # of inputs that have changed, or the step would count as done
    )
    leftovers = sorted((folder / UNFINISHED).glob("*"))
    try:
        evaluate()
    except UnfinishedEvaluationError:
        # Leftovers of another plan are refused untouched; a damaged part is removed, and the next
        # run goes on with the others.
        if sorted((folder / UNFINISHED).glob("*")) != leftovers:
            raise
        evaluate(restart=True)


def _ask(tasks: Tasks, folder: Path) -> None:
    from megatron_infoentropy.evaluate.model import load_hugging_face
    from megatron_infoentropy.tasks.ask import run_tasks

    run_tasks(
        folder / "hf",
        folder,
        load_hugging_face,
        suites=tasks.suites,
        tasks=tasks.names,
        task_folder=tasks.folder,
        limit=tasks.limit,
    )
