"""A run folder takes one loss and one seed, or says when they changed."""

import json
import re
from pathlib import Path

import pytest

from megatron_infoentropy.checkpoints import write_manifest
from megatron_infoentropy.data.manifest import Manifest, TokenizerFacts
from megatron_infoentropy.launch.recipe import warnings, written_flags
from megatron_infoentropy.launch.run_folder import recorded, require_same, write_facts
from megatron_infoentropy.launch.train import finish

CE, IE = (f"--infoentropy-objective={name}" for name in ("cross_entropy", "infoentropy"))
MODEL = ("--num-layers=2", "--train-iters=24", "--global-batch-size=8", "--micro-batch-size=8")


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "train.log").write_text("model parameters: 7\n")
    return folder


def words(run, *more, load=None):
    load = load or run / "checkpoints"
    return [*written_flags({}, {}), *MODEL, "--load", str(load), *more]


def save(run, step):
    checkpoint = run / "checkpoints" / f"iter_{step:07d}"
    checkpoint.mkdir(parents=True)
    (checkpoint / "weights").write_text("all of them")
    write_manifest(checkpoint)
    (run / "checkpoints" / "latest_checkpointed_iteration.txt").write_text(str(step))


def train(run, to, *more, load=None):
    """What `infoentropy train` does around its ranks, which save nothing if `to` is None."""
    line = words(run, *more, load=load)
    with recorded(run, Path("r.yaml"), line, 1, "CPU"):
        if to is not None:
            save(run, to)


def facts(run):
    return json.loads((run / "run.json").read_text())


def stages(run):
    return [(each["from_step"], each["objective"]) for each in facts(run).get("lineage", [])]


def require(run, *more, switch=False, load=None):
    require_same(run, words(run, *more, load=load), switch=switch)


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (IE, "objective cross_entropy, and this command line says objective infoentropy"),
        ("--seed=2", "seed 1234, and this command line says seed 2"),
        ("--infoentropy-z-loss=0.1", "z_loss 0.0, and this command line says z_loss 0.1"),
        ("--infoentropy-mtp-loss=weighted", "mtp_loss megatron, and .* says mtp_loss weighted"),
        ("--infoentropy-ignore-target=0", "ignore_target -1, and .* says ignore_target 0"),
    ],
)
def test_another_loss_or_seed_needs_a_switch_once_there_is_a_checkpoint(run, other, said):
    train(run, None, CE)
    require(run, CE, other)  # nothing was trained so far
    train(run, 16, CE)
    with pytest.raises(ValueError, match=f"16 steps trained with {said}.*--switch"):
        require(run, CE, other)
    require(run, CE, other, switch=True)
    with pytest.raises(ValueError, match="has no step to train so: make train-iters"):
        require(run, CE, other, "--train-iters=16", switch=True)


@pytest.mark.parametrize(
    "same",
    [
        *("--train-iters=99", "--lr=0.1", "--tensor-model-parallel-size=2"),
        *("--infoentropy-gamma=3", "--infoentropy-backend=reference"),
    ],
)
def test_length_rate_layout_and_what_has_no_effect_may_change(run, same):
    train(run, 16, CE)
    require(run, CE)
    require(run, CE, same)
    train(run, 20, CE, same)
    assert stages(run) == []


def test_another_model_is_refused_with_a_switch_too(run):
    train(run, 16, CE)
    for switch in (False, True):
        with pytest.raises(ValueError, match=r"model of num-layers 2, .* makes one of 3"):
            require(run, CE, "--num-layers=3", switch=switch)


def test_a_gpt_goes_on_as_a_hybrid_and_a_hybrid_as_nothing_else(run):
    train(run, 16, CE)
    hybrid = "--infoentropy-hybrid"
    require(run, CE, hybrid)
    train(run, 20, CE, hybrid)
    pattern = words(run, CE, "--hybrid-layer-pattern=*-*-")
    require_same(run, [word for word in pattern if word != "--num-layers=2"], switch=False)
    for switch in (False, True):
        with pytest.raises(ValueError, match=r"holds a hybrid model, .* add --infoentropy-hybrid"):
            require(run, CE, switch=switch)


def test_a_switch_is_told_of_and_taken_back_if_it_trained_no_step(run):
    train(run, 16, CE)
    before = facts(run)
    train(run, None, IE, "--train-iters=99")
    assert facts(run) == before | {"parameters": 7}
    train(run, 20, IE)
    assert stages(run) == [(0, "cross_entropy"), (16, "infoentropy")]
    assert facts(run)["objective"] == "infoentropy"
    train(run, 24, IE, "--seed=3")
    assert [each["seed"] for each in facts(run)["lineage"]] == [1234, 1234, 3]
    assert [each["from_step"] for each in facts(run)["lineage"]] == [0, 16, 20]


def test_under_slurm_a_switch_without_a_step_is_taken_back_at_the_end(run):
    train(run, 16, CE)
    write_facts(run, Path("r.yaml"), words(run, IE), 1, "CPU")
    assert stages(run) == [(0, "cross_entropy"), (16, "infoentropy")]
    finish(run, 1)
    assert stages(run) == []
    assert (facts(run)["objective"], facts(run)["loss"]["objective"]) == ("cross_entropy",) * 2


def test_an_earlier_checkpoint_drops_what_came_after_it(run):
    train(run, 16, CE)
    train(run, 20, IE)
    back = "--ckpt-step=16"
    require(run, CE, back)
    with pytest.raises(ValueError, match="16 steps trained with"):
        require(run, IE, back)
    train(run, 24, CE, back)
    assert stages(run) == []
    assert facts(run)["objective"] == "cross_entropy"


def test_a_run_that_goes_on_from_another_folder_inherits_its_stages(run, tmp_path):
    train(run, 16, CE)
    other = tmp_path / "other"
    other.mkdir()
    load = run / "checkpoints"
    require(other, IE, load=load)
    train(other, 20, IE, load=load)
    assert stages(other) == [(0, "cross_entropy"), (16, "infoentropy")]
    tuned = tmp_path / "tuned"
    tuned.mkdir()
    train(tuned, 20, IE, "--finetune", load=load)
    assert stages(tuned) == []  # its steps are all of one loss
    assert facts(tuned)["objective"] == "infoentropy"


def test_facts_of_an_earlier_version_or_none_are_no_reason_to_refuse(run):
    train(run, 16, CE)
    known = facts(run)
    (run / "run.json").write_text(json.dumps({k: v for k, v in known.items() if k != "loss"}))
    require(run, CE)
    (run / "run.json").write_text("{")
    with pytest.raises(ValueError, match=r"run\.json cannot be read .*: mend it, or remove it"):
        require(run, CE)
    (run / "run.json").unlink()
    require(run, IE)


SCHEDULE = ("--infoentropy-gamma-schedule=linear", "--infoentropy-gamma-samples=9")


@pytest.mark.parametrize(
    ("more", "warned"),
    [
        (["--infoentropy-gamma=-1"], "gamma -1 is negative"),
        (["--infoentropy-gamma=1"], ""),
        (["--infoentropy-gamma=-1", CE], ""),
        ([*SCHEDULE, "--infoentropy-gamma-end=-2"], "gamma -2 is negative"),
    ],
    ids=str,
)
def test_what_is_hardly_ever_meant_is_warned_of(tmp_path, more, warned):
    said = warnings(words(tmp_path, *more))
    assert len(said) == bool(warned)
    assert re.search(warned, "".join(said))


def test_conversations_go_on_with_their_own_tokenizer_alone(run, tmp_path):
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "tokenizer.json").write_text(json.dumps({"model": name}))
    chats = (CE, "--infoentropy-conversations", "--train-data-path", "chats/train.jsonl")
    one, other = ((*chats, f"--tokenizer-model={tmp_path / name}") for name in ("one", "other"))
    train(run, 16, *one)
    require(run, *one)
    for switch in (False, True):
        with pytest.raises(ValueError, match=r"holds a model of tokenizer .* name another --run"):
            require(run, *other, switch=switch)


def test_the_recorded_tokenizer_is_that_of_the_data(run, tmp_path):
    """None where the manifest is not there, or the flags name no data."""
    data = ("--train-data-path", "0.5", str(tmp_path / "a"), "0.5", str(tmp_path / "b"))
    told = []
    for there, flags in ((False, data), (True, data), (True, ())):
        if there:
            tokenizer = TokenizerFacts("ab12", 300, 0)
            choices = {"tokenizer": tokenizer, "dtype": "uint16", "append_eod": True}
            Manifest(folder=tmp_path, domains={}, **choices).save()
        train(run, None, CE, *flags)
        told.append(facts(run)["tokenizer_sha256"])
    assert told == [None, "ab12", None]
