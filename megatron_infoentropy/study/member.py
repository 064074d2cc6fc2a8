"""One run of a study: trained, exported, scored, asked; each step a folder or file of its own."""

import shutil
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from megatron_infoentropy.launch.recipe import load_plan, load_recipe
from megatron_infoentropy.study.data import Places, places
from megatron_infoentropy.study.ledger import Step, hash_files, hashes_of, run_steps
from megatron_infoentropy.study.plan import Member, Study, Tasks

CHECKPOINTS, CACHE = "checkpoints", "cache"
SCORES = ("evaluation.json", "evaluation.npz", "token_scores.npy")
_LATEST = "latest_checkpointed_iteration.txt"


def do_member(study: Study, member: Member, output: Path, data_digest: str) -> None:
    """Do what is not finished of one run.

    Raises:
        ValueError, RuntimeError: what stopped a step, in words.
    """
    run_steps(output / member.name, member_steps(study, member, output), data_digest)


def member_steps(study: Study, member: Member, output: Path) -> list[Step]:
    """What a run is made of, in order."""
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
    """What answers depend on: of a folder of tasks, also what its files hold."""
    asked = asdict(tasks)
    if tasks.folder is not None:
        found = hashes_of(hash_files(tasks.folder, (".",), known={}))
        # Asking compiles a task's own code.
        asked["files"] = {
            name: digest for name, digest in found.items() if "__pycache__" not in Path(name).parts
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
    cache = ("--data-cache-path", str(folder / CACHE))
    job = TrainingJob(
        study.recipe,
        where.tokens,
        where.tokenizer,
        folder,
        study.settings(member),
        extra_flags=cache,
    )
    train(job, build_command(job))
    shutil.rmtree(folder / CACHE, ignore_errors=True)


def _export(where: Places, folder: Path) -> None:
    from megatron_infoentropy.convert import convert_checkpoint, prove, why_not_now

    def check(made: Path) -> None:
        if not why_not_now(made):
            prove(folder / CHECKPOINTS, made)

    convert_checkpoint(
        folder / CHECKPOINTS,
        folder / "hf",
        tokenizer=where.tokenizer,
        overwrite=True,
        check=check,
    )


def _evaluate(study: Study, where: Places, folder: Path) -> None:
    from megatron_infoentropy.evaluate.evaluation import UNFINISHED, UnfinishedEvaluationError
    from megatron_infoentropy.evaluate.perplexity import ScoringOptions, evaluate_model

    options = ScoringOptions(max_tokens=study.scoring.max_tokens, device=study.scoring.device)
    evaluate = partial(
        evaluate_model,
        folder / "hf",
        where.tokens / study.scoring.split,
        options,
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
    from megatron_infoentropy.tasks.run import run_tasks

    run_tasks(
        folder / "hf",
        folder,
        suites=tasks.suites,
        tasks=tasks.names,
        task_folder=tasks.folder,
        limit=tasks.limit,
    )
