"""What the steps in a run folder were trained with, and whether a command line goes on with it.

run.json says it at its top level; where loss or seed changed on the way, `lineage` holds every
stage, oldest first, and the top level is the last one:

    "lineage": [{"from_step": 0, "objective": "cross_entropy", ..., "seed": 1, "loss": {...}}, ...]

The rule: one folder, one model, one loss, one seed, as long as it holds a checkpoint. A change of
loss or seed has to be asked for (--switch); learning rate, length, layout and data may change.
"""

import json
from pathlib import Path
from typing import Any

from megatron_infoentropy.checkpoints import RELEASE, choose
from megatron_infoentropy.data.tokenizer import TOKENIZER, is_tokenizer
from megatron_infoentropy.evaluate.runs import Stage, stage_of, stages_of
from megatron_infoentropy.launch.recipe import last_value, read_facts

FACTS, CHECKPOINTS = "run.json", "checkpoints"
SHAPE = (
    *("num-layers", "hidden-size", "ffn-hidden-size", "num-attention-heads", "num-query-groups"),
    "kv-channels",
)


class OtherTrainingError(ValueError):
    """The run folder holds a training that the command line does not go on with."""


def load_facts(run: Path) -> dict[str, Any]:
    """run.json, {} where there is none.

    Raises:
        ValueError: it cannot be read.
    """
    path = run / FACTS
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise ValueError(f"{path} cannot be read ({error}): mend it, or remove it") from error
    if not isinstance(facts, dict):
        raise ValueError(f"{path} is no description of a run: mend it, or remove it")
    return facts


def require_same_training(
    run: Path, words: list[str], tokenizer_sha256: str | None, *, switch: bool
) -> None:
    """Check that the run folder's checkpoint, if it has one, was trained as `words` go on.

    switch: loss and seed may be others.

    Raises:
        OtherTrainingError: names what differs, and what to do.
        DamagedCheckpointError: the folder has checkpoints, and none that can be loaded.
    """
    known, step = load_facts(run), saved_step(run, words)
    if not step:
        return
    if known and _loads_own(run, words):
        _require_same_model(run, known, words, tokenizer_sha256)
    before, facts = _stages(known, step), read_facts(words)
    ours = stage_of(facts)
    if not before or _is_same(before[-1], ours):
        return
    theirs, here = _differences(before[-1], ours)
    differs = f"{run} holds {step:,} steps trained with {theirs}, and this command line says {here}"
    if not switch:
        raise OtherTrainingError(
            f"{differs}: name another --run, or go on from them all the same with --switch"
        )
    if (facts["train_iters"] or step + 1) <= step:
        raise OtherTrainingError(
            f"{differs}, but has no step to train so: make train-iters larger, or name another "
            "--run"
        )


def _require_same_model(
    run: Path, known: dict[str, Any], words: list[str], tokenizer_sha256: str | None
) -> None:
    """
    Raises:
        OtherTrainingError: what no switch can change.
    """
    old = [str(word) for word in known.get("command", [])]
    shapes = {name: (last_value(old, name), last_value(words, name)) for name in SHAPE}
    recorded = known.get("tokenizer_sha256")
    if not _is_ours(recorded, words):
        shapes["tokenizer"] = (recorded, tokenizer_sha256)
    for name, (theirs, ours) in shapes.items():
        if theirs and ours and theirs != ours:
            raise OtherTrainingError(
                f"{run} holds a model of {name} {theirs}, this command line makes one of {ours}: "
                "name another --run"
            )


def _is_ours(recorded: str | None, words: list[str]) -> bool:
    """Say whether a digest is that of the command line's tokenizer, as any version recorded it."""
    folder = Path(last_value(words, "tokenizer-model") or "")
    return bool(recorded) and (folder / TOKENIZER).is_file() and is_tokenizer(folder, str(recorded))


def lineage(run: Path, words: list[str]) -> list[Stage]:
    """The stages of the training that `words` start or go on with, oldest first."""
    start, known = saved_step(run, words) or 0, load_facts(run)
    if not _loads_own(run, words):
        start, known = _loaded_from(words)
    before, facts = _stages(known, start), read_facts(words)
    ours = stage_of(facts, start if before else 0)
    if before and _is_same(before[-1], ours):
        return before
    return [*before, ours]


def take_back(facts: dict[str, Any], step: int | None) -> dict[str, Any]:
    """run.json without its last stage where the checkpoint, that of `step`, has no step of it."""
    stages = facts.get("lineage", [])
    if step is None or not stages or step > stages[-1]["from_step"]:
        return facts
    *stages, _ = stages
    before = {name: value for name, value in stages[-1].items() if name != "from_step"}
    rest = {name: value for name, value in facts.items() if name != "lineage"}
    return rest | before | ({"lineage": stages} if len(stages) > 1 else {})


def saved_step(run: Path, words: list[str]) -> int | None:
    """Of the run's checkpoint that a training would load, without reading it; None for none."""
    return _step_in(run / CHECKPOINTS, last_value(words, "ckpt-step"), is_ours=True)


def _loaded_from(words: list[str]) -> tuple[int, dict[str, Any]]:
    """(step, run.json) of the checkpoint of another folder; the step counts anew in a finetuning.

    Raises:
        DamagedCheckpointError: as `choose` does.
    """
    load = last_value(words, "load")
    if load is None or "://" in load or "--finetune" in words:
        return 0, {}
    step = _step_in(Path(load), last_value(words, "ckpt-step"), is_ours=False)
    return step or 0, load_facts(Path(load).parent)


def _step_in(checkpoints: Path, wanted: str | None, *, is_ours: bool) -> int | None:
    if not checkpoints.is_dir():
        return None
    named = choose(checkpoints, int(wanted or 0) or None, is_ours=is_ours).name
    return None if named is None else 0 if named == RELEASE else int(named)


def _loads_own(run: Path, words: list[str]) -> bool:
    load = last_value(words, "load")
    return load is None or Path(load).resolve() == (run / CHECKPOINTS).resolve()


def _stages(facts: dict[str, Any], step: int) -> list[Stage]:
    """Return the stages of a run.json that are in its checkpoint of this step."""
    return [stage for stage in stages_of(facts) if stage.from_step < step] if facts else []


def _is_same(one: Stage, other: Stage) -> bool:
    return (one.seed, one.loss) == (other.seed, other.loss)


def _differences(one: Stage, other: Stage) -> tuple[str, str]:
    """What differs, as each of the two says it."""
    both = [vars(stage.loss) | {"seed": stage.seed} for stage in (one, other)]
    names = [name for name in both[0] if both[0][name] != both[1][name]]
    theirs, ours = (", ".join(f"{name} {each[name]}" for name in names) for each in both)
    return theirs, ours
