"""The command that trains, and what a run leaves behind, with ranks that only pretend."""

import json
import sys
from contextlib import nullcontext
from dataclasses import fields, replace
from pathlib import Path
from typing import get_args

import numpy as np
import pytest

from megatron_infoentropy.config import MEANS, InfoEntropyConfig, Objective
from megatron_infoentropy.data.manifest import Manifest, TokenizerFacts
from megatron_infoentropy.data.tokenizer import tokenizer_digest
from megatron_infoentropy.data.writer import DatasetWriter
from megatron_infoentropy.files import commit_of
from megatron_infoentropy.launch import job as jobs
from megatron_infoentropy.launch import train as launch
from megatron_infoentropy.launch.cluster import Cluster
from megatron_infoentropy.launch.dry_run import dry_run
from megatron_infoentropy.launch.job import SPLITS, TrainingJob, require_places
from megatron_infoentropy.launch.recipe import loss_flags, read_facts, read_loss, written_flags
from megatron_infoentropy.launch.run_folder import PACKAGE, STOPPED
from megatron_infoentropy.launch.scripts import prepare
from megatron_infoentropy.runtime.cpu import CPU_FLAGS
from megatron_infoentropy.runtime.device import CPU_ENVIRONMENT, Device

TP2 = {"tensor-model-parallel-size": 2}
RECIPE = Path(__file__).parents[2] / "examples" / "tiny.yaml"

TALKING_RANK = """
import sys
print("model parameters: 1234")
for i in range(1, 4):
    print(f" [2026-01-01 00:00:00.0] iteration {i:8d}/       3 | objective: {i}.0E+00 |")
sys.exit(0)
"""


@pytest.fixture
def job(tmp_path, monkeypatch):
    monkeypatch.setattr(launch, "find_device", lambda: Device("cpu", "gloo", 1))
    (tmp_path / "tok").mkdir()
    (tmp_path / "tok" / "tokenizer.json").write_text("{}")
    for split in SPLITS:
        folder = tmp_path / "data" / split
        folder.mkdir(parents=True)
        domains = {
            "B text": write_dataset(folder / "b_text", 30),
            "A text": write_dataset(folder / "a_text", 10),
        }
        Manifest(
            folder=folder,
            tokenizer=TokenizerFacts(tokenizer_digest(tmp_path / "tok"), 100, 0),
            dtype="uint16",
            append_eod=True,
            domains=domains,
        ).save()
        np.save(folder / "token_counts.npy", np.zeros((2, 100), dtype=np.int64))
    return TrainingJob(RECIPE, tmp_path / "data", tmp_path / "tok", tmp_path / "run")


def words_of(job, *flags, **changes):
    """The command line of the job with these flags and changes."""
    return launch.build_command(replace(job, extra_flags=flags, **changes)).words


def trained(job, code):
    """What a training said of itself whose ranks are this program."""
    return launch.train(job, pretend(job, code))


def facts_in(run):
    return json.loads((run / "run.json").read_text())


class ChatTokenizer:
    chat_template: str | None = "a template"

    def __len__(self):
        return 100


def test_conversations_take_the_place_of_datasets(job, tmp_path, monkeypatch):
    monkeypatch.setattr(jobs, "load_with_transformers", lambda folder: ChatTokenizer())
    train, validation = (job.data / f"{split}.jsonl" for split in ("train", "validation"))
    train.write_text("{}\n")
    with pytest.raises(ValueError, match=r"validation\.jsonl is not there: .* --eval-iters 0"):
        launch.build_command(job)
    words = words_of(job, "--eval-iters", "0")
    assert values(words, "--train-data-path") == [str(train)]
    assert "--valid-data-path" not in words
    assert "--infoentropy-conversations" in words
    validation.write_text("{}\n")
    words = words_of(job)
    assert values(words, "--valid-data-path") == [str(validation)]
    assert "--test-data-path" not in words
    trained(job, TALKING_RANK)
    assert facts_in(job.run)["tokenizer_sha256"] == tokenizer_digest(job.tokenizer)
    recipe = with_launch_section(tmp_path, "  ranks: 1", vocab_size=99)
    with pytest.raises(ValueError, match=r"a vocabulary of 99, the tokenizer .* has 100"):
        launch.build_command(replace(job, recipe=recipe))
    monkeypatch.setattr(ChatTokenizer, "chat_template", None)
    with pytest.raises(ValueError, match=r"tok has no chat template: put a chat_template.jinja"):
        launch.build_command(job)


def write_dataset(prefix, tokens):
    lengths = prefix.with_suffix(".lengths")
    writer = DatasetWriter(prefix, vocab_size=100, lengths=lengths)
    writer.add(np.zeros(tokens, np.int64), np.array([tokens]))
    facts = writer.finish()
    writer.close()
    lengths.unlink()
    return facts


def values(words, flag):
    """What follows a flag, up to the next one; the last time it is given."""
    start = len(words) - words[::-1].index(flag)
    rest = words[start:]
    stop = next((i for i, word in enumerate(rest) if word.startswith("--")), len(rest))
    return rest[:stop]


@pytest.mark.parametrize("objective", sorted({*get_args(Objective)} - {"custom"}))
def test_an_objective_alone_is_normalized_as_the_configuration_would(objective):
    words = written_flags({}, loss_flags({"objective": objective}))
    assert read_loss(words) == InfoEntropyConfig(objective=objective)


def test_the_command_tells_the_whole_objective_and_the_data_blend(job):
    loss = {"objective": "focal", "gamma": 2.0, "normalization": "global", "detach_weight": False}
    words = words_of(job, "--lr", "1", settings=loss_flags(loss) | TP2 | {"seed": 7})
    assert words.index(CPU_FLAGS[0]) < words.index("--num-layers")
    assert values(words, "--lr") == ["1"]
    assert values(words, "--nproc-per-node")[0] == "2"
    assert values(words, "--infoentropy-objective") == ["focal"]
    assert values(words, "--infoentropy-gamma") == ["2.0"]
    assert values(words, "--infoentropy-normalization") == ["global"]
    assert "--no-infoentropy-detach-weight" in words
    assert values(words, "--seed") == ["7"]
    blend = values(words, "--train-data-path")
    assert [Path(word).name for word in blend] == ["0.75", "b_text", "0.25", "a_text"]


def test_data_made_anew_in_their_folder_get_an_index_cache_of_their_own(job):
    """Of train, validation and test; without the latter two where nothing is evaluated."""

    def cache(**settings):
        return values(words_of(job, settings=settings), "--data-cache-path")

    first, unevaluated = cache(), cache(**{"eval-iters": 0})
    assert cache() == first
    for split, same in (("test", unevaluated), ("train", None)):
        path = job.data / split / "manifest.json"
        path.write_text(path.read_text().replace('"documents": 1', '"documents": 2', 1))
        assert cache() != first
        assert (cache(**{"eval-iters": 0}) == unevaluated) is (same is not None)


def test_without_a_gpu_one_thread_a_rank_on_two_cores(job, monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    for name in ("OMP_NUM_THREADS", *CPU_ENVIRONMENT):
        monkeypatch.delenv(name, raising=False)
    environment = launch.build_command(replace(job, settings=TP2)).environment
    assert environment["OMP_NUM_THREADS"] == "1"
    assert environment.items() >= CPU_ENVIRONMENT.items()
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.check=3")
    environment = launch.build_command(job).environment
    assert environment["OMP_NUM_THREADS"] == "5"
    assert environment["GLIBC_TUNABLES"] == "glibc.malloc.check=3"


@pytest.mark.parametrize(
    ("gpus", "global_batch", "ranks"), [(8, 64, 8), (8, 8, 2), (8, 24, 6), (3, 64, 2), (1, 8, 2)]
)
def test_gpus_are_used_as_far_as_the_batch_divides(job, monkeypatch, gpus, global_batch, ranks):
    """Micro-batches of 8 at TP2: the number of copies of the model must divide the batch."""
    monkeypatch.setattr(launch, "find_device", lambda: Device("cuda", "nccl", gpus))
    extra = ("--global-batch-size", str(global_batch))
    command = launch.build_command(replace(job, settings=TP2, extra_flags=extra))
    assert command.ranks == ranks
    assert "--distributed-backend=gloo" not in command.words
    assert not command.environment.keys() & CPU_ENVIRONMENT.keys()


def test_options_overrule_the_recipe_and_the_recipe_the_defaults(job, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        RECIPE.read_text() + "\nloss:\n  infoentropy-gamma: 2.0\n  seed: 99\n"
        "  infoentropy-normalization: global\n  tensor-model-parallel-size: 2\n"
    )
    names = ("gamma", "seed", "normalization", "tensor_parallel", "sigma", "detach_weight")
    settings = loss_flags({"gamma": 0.5, "sigma": None}) | {"seed": 7}
    for given, expected in (
        ({}, [2.0, 99, "global", 2, 1.0, True]),
        (settings, [0.5, 7, "global", 2, 1.0, True]),
    ):
        facts = read_facts(words_of(job, recipe=recipe, settings=given))
        assert [facts[name] for name in names] == expected


def with_launch_section(tmp_path, launch, **flags):
    recipe = tmp_path / "recipe.yaml"
    extra = "".join(f"  {name.replace('_', '-')}: {value}\n" for name, value in flags.items())
    recipe.write_text(f"{RECIPE.read_text()}\nmore:\n  bf16: true\n{extra}launch:\n{launch}\n")
    return recipe


def test_a_recipe_weighs_the_training_data_and_no_other(job, tmp_path):
    weights = tmp_path / "weights.json"
    weights.write_text('{"A text": 3, "B text": 2}')
    recipe = with_launch_section(tmp_path, f"  data-weights: {weights}\n  ranks: 64")
    words = words_of(job, recipe=recipe)
    blend = values(words, "--train-data-path")
    assert [Path(word).name for word in blend] == ["0.6", "a_text", "0.4", "b_text"]
    assert values(words, "--valid-data-path")[0] == "0.75"
    assert "--ranks" not in words
    assert values(words, "--nproc-per-node")[0] == "1"  # this machine's, not the plan's 64


def test_without_validation_only_training_data_are_named(job):
    words = words_of(job, "--eval-iters", "0")
    assert "--train-data-path" in words
    assert {"--valid-data-path", "--test-data-path"}.isdisjoint(words)


def test_data_of_another_vocabulary_than_the_recipes_are_refused(job, tmp_path):
    from_elsewhere = ("--pretrained-checkpoint", "start")  # which may have more rows
    for size, flags, said in (
        (100, (), None),
        (101, (), r"a vocabulary of 101, the tokenizer .* has 100"),
        (101, from_elsewhere, None),
        (99, from_elsewhere, r"a vocabulary of 99, the tokenizer .* has 100"),
    ):
        recipe = with_launch_section(tmp_path, "  ranks: 1", vocab_size=size)
        with pytest.raises(ValueError, match=said) if said else nullcontext():
            words_of(job, *flags, recipe=recipe)


def test_a_tokenizer_that_is_not_there_or_another_is_refused_before_any_rank_starts(job):
    nowhere, file = replace(job, tokenizer=job.run / "nope"), job.tokenizer / "tokenizer.json"
    with pytest.raises(ValueError, match=r"nope holds no tokenizer\.json: give --tokenizer"):
        launch.build_command(nowhere)
    with pytest.raises(ValueError, match=r"nope holds no tokenizer\.json"):
        prepare(nowhere, Cluster(gpus_per_node=0), "a test")
    file.write_text("version https://git-lfs.github.com/spec/v1")
    with pytest.raises(ValueError, match=r"tok/tokenizer\.json is a Git LFS pointer"):
        dry_run(RECIPE, {}, tokenizer=job.tokenizer)
    file.write_text('{"another": 1}')
    with pytest.raises(ValueError, match="not the tokenizer that the training data were made with"):
        launch.build_command(job)


@pytest.mark.parametrize("name", ["train/b_text.bin", "validation/a_text.idx"])
def test_data_that_were_cut_off_are_refused_before_any_rank_starts(job, name):
    path = job.data / name
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=f"{path} is cut off: .* bytes, expected .*write it again"):
        launch.build_command(job)
    path.unlink()
    with pytest.raises(ValueError, match=f"no such dataset file: {path}"):
        launch.build_command(job)


def test_training_says_which_folders_it_misses():
    with pytest.raises(ValueError, match="training needs --data, --run; "):
        require_places(data=None, tokenizer=Path("t"), run=None)


def test_ranks_that_do_not_fit_the_layout_or_the_batch_are_refused(job):
    with pytest.raises(ValueError, match="3 ranks cannot be split into tensor-parallel 2"):
        words_of(job, settings=TP2, ranks=3)
    with pytest.raises(ValueError, match=r"context-parallel 2; use a multiple of 4"):
        words_of(job, "--context-parallel-size", "2", settings=TP2, ranks=2)
    assert words_of(job, "--context-parallel-size", "2", ranks=2)  # one copy of the model
    with pytest.raises(ValueError, match="a global batch of 8 cannot be shared by 2 data-parallel"):
        words_of(job, ranks=2)


def pretend(job, code):
    command = launch.build_command(job)
    return replace(command, words=[sys.executable, "-c", code, *command.words])


def test_a_run_leaves_its_log_and_its_facts(job):
    job = replace(job, extra_flags=("--infoentropy-gamma=3", "--no-infoentropy-detach-weight"))
    command = pretend(job, TALKING_RANK)
    launch.train(job, command)
    expected = {
        **{"parameters": 1234, "objective": "infoentropy", "train_iters": 100, "seq_length": 256},
        "command": command.words,
        # The last word on the command line, as the ranks read it.
        **{"gamma": 3.0, "detach_weight": False},
    }
    facts = facts_in(job.run)
    assert {name: facts[name] for name in expected} == expected
    assert facts["versions"]["commit"] == commit_of(PACKAGE.parent)
    log = (job.run / "train.log").read_text()
    assert log.startswith("model parameters: 1234\n")
    assert len(log.splitlines()) == 4


TORN_RANKS = """
print("model parameters: 205120 > number of parameters on (tensor, pipeline) model parallel rank")
print(" iteration        1/       3 | objective: 1.0E+00 |")
print(" iteration        2/       3 | objective: 1.2.3 | iteration        3/       3 | x: 1.2.3 |")
print("WARNING: the checkpoint was trained with objective=focal and this run goes on with another")
print(" iteration        3/       3 | objective: 3.0E+00 |")
"""


def test_lines_that_two_ranks_wrote_into_are_read_as_far_as_they_can_be(job, capsys):
    trained(job, TORN_RANKS)
    assert facts_in(job.run)["parameters"] == 205120
    assert "WARNING: the checkpoint was trained with objective=focal" in capsys.readouterr().err


def test_a_run_folder_of_another_objective_is_refused_before_any_rank_starts(job):
    trained(job, TALKING_RANK)
    (job.run / "checkpoints" / "iter_0000003").mkdir(parents=True)
    (job.run / "checkpoints" / "latest_checkpointed_iteration.txt").write_text("3")
    other = replace(job, settings=loss_flags({"objective": "focal"}))
    refused = r"3 steps trained with objective infoentropy, .*--switch"
    with pytest.raises(ValueError, match=refused):
        launch.build_command(other)
    assert launch.build_command(replace(other, switch=True)).ranks == 1
    with pytest.raises(ValueError, match=refused):
        prepare(other, Cluster(gpus_per_node=0), "a test")


VALIDATED = """
print(" iteration        2/       3 | cross entropy: 5.5E+00 |")
print(" validation loss at iteration 2 | cross entropy value: 6.25E+00 |")
"""


def test_steps_before_this_start_are_no_part_of_its_rate(job, capsys):
    trained(job, VALIDATED)
    assert capsys.readouterr().err == "train run: 2 of 3 iterations\n"


def test_a_training_ends_with_what_came_of_it(job):
    losses = "cross entropy 5.5000, of validation data 6.2500 at step 2"
    assert trained(job, VALIDATED).outcome() == f"trained to step 2 of 3: {losses}"
    said = trained(job, f"{VALIDATED}\nprint({STOPPED!r})").outcome()
    assert said == f"stopped after saving at step 2 of 3: {losses}"
    saves = " [2026] saving checkpoint at iteration       3 to x in torch_dist format"
    said = trained(job, f"{VALIDATED}\nprint({saves!r})").outcome()
    assert said == f"trained to step 3 of 3: {losses.replace('5.5000', '5.5000 at step 2')}"
    said = trained(job, "pass").outcome()
    assert said == "no step is in the log: the run has had its train-iters"


@pytest.mark.parametrize(
    ("values", "why"),
    [
        ("loss scale: 1.0", "no token of a step in the last log interval had a target"),
        ("accuracy: 0.0E+00", "the loss became NaN in the last log interval"),
        (
            "cross entropy: 0.0E+00 | accuracy: 0.0E+00 | number of skipped iterations:   1",
            "Megatron skipped all steps of the last log interval",
        ),
    ],
)
def test_a_training_that_ends_without_a_loss_says_why(job, values, why):
    said = trained(job, VALIDATED.replace("cross entropy: 5.5E+00", values))
    assert said.outcome().startswith(f"trained to step 2 of 3: {why}")


def test_a_failed_run_shows_the_ranks_own_words_and_where_the_log_is(job):
    with pytest.raises(launch.TrainingFailed, match="reasons of their own") as failure:
        trained(job, "raise ValueError('the ranks have reasons of their own')")
    assert str(job.run / "train.log") in str(failure.value)
    assert facts_in(job.run)["parameters"] is None


def test_of_flags_that_are_refused_there_is_one_sentence_and_no_page(job):
    refuse = 'import sys; sys.exit("usage: [--num-layers N]\\nx.py: error: argument --lr: no")'
    with pytest.raises(launch.TrainingFailed) as failure:
        trained(job, refuse)
    log = job.run / "train.log"
    said = f"Megatron refuses the flags: argument --lr: no; the whole log is {log}"
    assert str(failure.value) == said


# Two ranks that have met, of which torch numbers the lines; both are deep, the second dies of the
# first. (Functions that call each other: Python shortens the traceback of one that calls itself.)
DEEP_RANKS = """
import sys, traceback
def ping(depth): pong(depth)
def pong(depth): ping(depth - 1) if depth else fail()
def fail(): raise RuntimeError("what was raised\\nin two lines")
try:
    ping(60)
except RuntimeError:
    said = traceback.format_exc().splitlines()
{write}
sys.exit(1)
"""
ONE = 'print("\\n".join(said))'
IN_TURN = """
for line in said: print("[rank0]: " + line)
for line in said: print("[rank1]: " + line.replace("what was", "connection closed, not"))
"""
MIXED = """
for line in said: print(f"[rank0]: {line}\\n[rank1]: {line.replace('what was', 'closed, not')}")
"""


@pytest.mark.parametrize("write", [ONE, IN_TURN, MIXED], ids=["one", "in turn", "mixed"])
def test_of_a_deep_traceback_the_end_is_shown(job, write):
    with pytest.raises(launch.TrainingFailed) as failure:
        trained(job, DEEP_RANKS.replace("{write}", write))
    said = str(failure.value)
    assert said.endswith("RuntimeError: what was raised\nin two lines")
    assert said.count("Traceback (most recent call last)") == 1
    assert "\n  ...\n" in said


def test_run_json_holds_the_whole_loss():
    """Runs that differ in any of it must not be taken for seeds of one setting."""
    words = ["--infoentropy-objective", "focal", "--infoentropy-z-loss", "1e-4"]
    words += ["--infoentropy-blend", "0.5", "--infoentropy-gamma-schedule", "linear"]
    words += ["--infoentropy-gamma-samples", "500", "--infoentropy-backend", "reference"]
    loss = read_facts(words)["loss"]
    assert (loss["objective"], loss["z_loss"], loss["blend"]) == ("focal", 1e-4, 0.5)
    assert (loss["gamma_schedule"], loss["gamma_samples"]) == ("linear", 500)
    assert loss.keys() == {field.name for field in fields(InfoEntropyConfig)} - set(MEANS)
    assert "backend" not in loss
