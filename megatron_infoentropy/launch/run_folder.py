"""What a training leaves behind beside its checkpoints: run.json, and its log.

RUN/run.json       what was run: objective, seed, sizes, tokenizer, command, versions
RUN/train.log      everything Megatron printed
RUN/checkpoints/   Megatron's torch_dist checkpoints

run.json says at its top level what the steps were trained with; where loss or seed changed on the
way, `lineage` holds every stage, oldest first, and the top level is the last one:

    "lineage": [{"from_step": 0, "objective": "cross_entropy", ..., "seed": 1, "loss": {...}}, ...]

One folder, one model, one loss, one seed: docs/launching.md has the rule.
"""

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

from megatron_infoentropy.checkpoints import RELEASE, choose
from megatron_infoentropy.data.manifest import load_manifest
from megatron_infoentropy.data.tokenizer import tokenizer_digest
from megatron_infoentropy.evaluate.runs import Stage, stage_of, stages_of
from megatron_infoentropy.files import commit_of, write_whole
from megatron_infoentropy.launch.recipe import (
    given_flags,
    last_value,
    ranks_of_a_model,
    read_facts,
)
from megatron_infoentropy.runtime.device import Device

FACTS, CHECKPOINTS = "run.json", "checkpoints"
LOG = "train.log"
TRAIN_DATA = "--train-data-path"
STOPPED = "exiting program after receiving SIGTERM"  # Megatron's words, whatever the signal was
PACKAGE = Path(__file__).parents[1]
VERSIONS = ("megatron-infoentropy", "megatron-core", "torch", "transformers")
SHAPE = (
    *("num-layers", "hidden-size", "ffn-hidden-size", "num-attention-heads", "num-query-groups"),
    "kv-channels",
)
CONVERSATIONS = "infoentropy-conversations"
HYBRID = ("infoentropy-hybrid", "hybrid-layer-pattern", "hybrid-override-pattern")


def load_facts(run: Path) -> dict[str, Any]:
    """Return what run.json says, {} where there is none.

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


def require_same(run: Path, words: list[str], *, switch: bool) -> None:
    """Check that the run folder's checkpoint, if it has one, was trained as `words` go on.

    switch: loss and seed may be others.

    Raises:
        ValueError: names what differs, and what to do.
        DamagedCheckpointError: the folder has checkpoints, and none that can be loaded.
    """
    known, step = load_facts(run), saved_step(run, words)
    if not step:
        return
    if known and _loads_own(run, words):
        _require_same_model(run, known, words)
    before, facts = _stages(known, step), read_facts(words)
    ours = stage_of(facts)
    theirs, here = _differences(before[-1], ours) if before else ("", "")
    if theirs == here:
        return
    differs = f"{run} holds {step:,} steps trained with {theirs}, and this command line says {here}"
    if not switch:
        raise ValueError(
            f"{differs}: name another --run, or go on from them all the same with --switch"
        )
    if (facts["train_iters"] or step + 1) <= step:
        raise ValueError(
            f"{differs}, but has no step to train so: make train-iters larger, or name another "
            "--run"
        )


def _require_same_model(run: Path, known: dict[str, Any], words: list[str]) -> None:
    """Check what no switch can change."""
    old, recorded = [str(word) for word in known.get("command", [])], known.get("tokenizer_sha256")
    shapes = {name: (last_value(old, name), last_value(words, name)) for name in SHAPE}
    if _is_hybrid(old) and not _is_hybrid(words):
        raise ValueError(
            f"{run} holds a hybrid model, and Megatron goes on from it with a hybrid alone: add "
            "--infoentropy-hybrid, or name another --run"
        )
    shapes["tokenizer"] = (recorded, _tokenizer_sha256(words))
    for name, (theirs, ours) in shapes.items():
        if theirs and ours and theirs != ours:
            raise ValueError(
                f"{run} holds a model of {name} {theirs}, this command line makes one of {ours}: "
                "name another --run"
            )


def _is_hybrid(words: list[str]) -> bool:
    return not given_flags(words).keys().isdisjoint(HYBRID)


def lineage(run: Path, words: list[str]) -> list[Stage]:
    """Return the stages of the training that `words` start or go on with, oldest first."""
    start, known = saved_step(run, words) or 0, load_facts(run)
    if not _loads_own(run, words):
        start, known = _loaded_from(words)
    before, facts = _stages(known, start), read_facts(words)
    ours = stage_of(facts, start if before else 0)
    if before and (before[-1].seed, before[-1].loss) == (ours.seed, ours.loss):
        return before
    return [*before, ours]


def take_back(facts: dict[str, Any], step: int | None) -> dict[str, Any]:
    """Return run.json without its last stage where the checkpoint, of `step`, has no step of it."""
    stages = facts.get("lineage", [])
    if step is None or not stages or step > stages[-1]["from_step"]:
        return facts
    *stages, _ = stages
    before = {name: value for name, value in stages[-1].items() if name != "from_step"}
    rest = {name: value for name, value in facts.items() if name != "lineage"}
    return rest | before | ({"lineage": stages} if len(stages) > 1 else {})


def saved_step(run: Path, words: list[str]) -> int | None:
    """Return the step of the checkpoint that a training would load, None for none."""
    return _step_in(run / CHECKPOINTS, last_value(words, "ckpt-step"), is_ours=True)


def _loaded_from(words: list[str]) -> tuple[int, dict[str, Any]]:
    """Return step and run.json of another folder's checkpoint; a finetuning counts from 0."""
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


def _differences(one: Stage, other: Stage) -> tuple[str, str]:
    """Return what differs, as each of the two says it."""
    both = [vars(stage.loss) | {"seed": stage.seed} for stage in (one, other)]
    names = [name for name in both[0] if both[0][name] != both[1][name]]
    theirs, ours = (", ".join(f"{name} {each[name]}" for name in names) for each in both)
    return theirs, ours


def write_facts(run: Path, recipe: Path, words: list[str], ranks: int, device: str) -> None:
    """Write `run.json` of the training that the command line `words` starts or goes on with.

    The number of parameters, which only a training says, stays as it is known.
    """
    facts, stages = read_facts(words), lineage(run, words)
    more = len(stages) > 1
    content = {
        "name": run.name,
        **facts,
        **({"lineage": [{"from_step": s.from_step, **s.facts} for s in stages]} if more else {}),
        "data_parallel": ranks // ranks_of_a_model(facts),
        "device": device,
        "parameters": load_facts(run).get("parameters"),
        "tokenizer_sha256": _tokenizer_sha256(words),
        "recipe": recipe.name,
        "command": words,
        "versions": {name: version(name) for name in VERSIONS}
        | {"commit": commit_of(PACKAGE.parent)},
    }
    run.mkdir(parents=True, exist_ok=True)
    _write(run, content)


@contextmanager
def recorded(run: Path, recipe: Path, words: list[str], ranks: int, device: str) -> Iterator[None]:
    """Have run.json say what is trained meanwhile, and afterwards what the newest checkpoint is.

    A training that saved no step changes nothing of a run that has a checkpoint.
    """
    before, start = load_facts(run), saved_step(run, words)
    write_facts(run, recipe, words, ranks, device)
    try:
        yield
    finally:
        with suppress(ValueError):  # a damaged checkpoint: the reason of another error, if any
            settle_facts(run)
            if before and start is not None and (saved_step(run, []) or 0) <= start:
                _write(run, {**before, "parameters": load_facts(run)["parameters"]})


def _tokenizer_sha256(words: list[str]) -> str | None:
    """Return the digest of the tokenizer of the training data, if their manifest is there.

    Conversations have none: that of the tokenizer which is given.
    """
    if f"--{CONVERSATIONS}" in words:
        return tokenizer_digest(Path(last_value(words, "tokenizer-model") or ""))
    if TRAIN_DATA not in words:
        return None
    last = len(words) - words[::-1].index(TRAIN_DATA)  # of a flag given twice
    try:
        _, prefix = words[last:][:2]  # a blend: WEIGHT PREFIX ...
        return load_manifest(Path(prefix).parent).tokenizer.sha256
    except (OSError, ValueError):
        return None


def settle_facts(run: Path) -> None:
    """Have `run.json` say what only the training could: the model's size, and what came of it."""
    facts, parameters = load_facts(run), parameters_in(run / LOG)
    if facts:
        known = {} if parameters is None else {"parameters": parameters}
        _write(run, take_back(facts, saved_step(run, [])) | known)


def parameters_in(log: Path) -> int | None:
    """Return the number that Megatron said when it built the model."""
    if not log.is_file():
        return None
    with log.open(encoding="utf-8", errors="replace") as lines:
        found = (re.search(r"model parameters: (\d+)", line) for line in lines)
        return next((int(said[1]) for said in found if said), None)


def _write(run: Path, content: dict[str, Any]) -> None:
    write_whole(run / FACTS, json.dumps(content, indent=2) + "\n")


def device_name(device: Device) -> str:
    """Name what this process runs on, for a reader."""
    if device.type == "cpu":
        return f"CPU, {os.cpu_count()} cores"
    import torch

    return f"{device.count} x {torch.cuda.get_device_name()}"
