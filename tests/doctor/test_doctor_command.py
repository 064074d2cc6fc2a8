"""`infoentropy doctor --distributed` as a user runs it, on data that are whole and on others."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from megatron_infoentropy.cli import app
from megatron_infoentropy.data.manifest import Options
from megatron_infoentropy.data.preprocess import preprocess
from megatron_infoentropy.data.tokenizer import train_tokenizer
from megatron_infoentropy.doctor.data_files import Share, look
from megatron_infoentropy.doctor.facts import Place, collect
from megatron_infoentropy.doctor.start import last_words

RECIPE = Path(__file__).parents[2] / "examples" / "tiny.yaml"


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """data/{train,validation,test}, the tokenizer that made them and another one."""
    folder = tmp_path_factory.mktemp("doctor")
    text = "\n".join(json.dumps({"text": f"word{i} " * 40}) for i in range(300)) + "\n"
    (folder / "t.jsonl").write_text(text)
    train_tokenizer(folder / "t.jsonl", folder / "tokenizer", vocab_size=270)
    train_tokenizer(folder / "t.jsonl", folder / "other", vocab_size=265)
    options = Options(split_by=None)
    preprocess(
        [folder / "t.jsonl"], folder / "tokenizer", folder / "data" / "train", options=options
    )
    for split in ("validation", "test"):
        shutil.copytree(folder / "data" / "train", folder / "data" / split)
    return folder


@pytest.fixture
def damaged(places, tmp_path):
    """The data with a byte of the test split flipped."""
    data = shutil.copytree(places / "data", tmp_path / "data")
    path = next((data / "test").glob("*.bin"))
    content = bytearray(path.read_bytes())
    content[10] ^= 1
    path.write_bytes(bytes(content))
    return data


def two_ranks(data, tokenizer, run, **options):
    ranks = [Place(rank, 2, rank % 1, 1) for rank in range(2)]
    return [collect(place, data, tokenizer, run, **options) for place in ranks]


def test_the_ranks_share_the_checksums_and_one_of_them_finds_a_flipped_byte(
    places, damaged, tmp_path
):
    whole = two_ranks(places / "data", places / "tokenizer", tmp_path / "new")
    assert [one.problems for one in whole] == [(), ()]
    assert all(one.tokenizer == one.data.tokenizer for one in whole)
    assert [(one.data.opened, one.data.compared) for one in whole] == [(6, 3), (6, 3)]
    found = two_ranks(damaged, places / "tokenizer", tmp_path / "new")
    said = [problem for one in found for problem in one.problems]
    assert len(said) == 1
    assert "its checksum differs from the manifest's" in said[0]


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_no_rank_reads_more_than_a_file_above_another(places, ranks):
    """A .bin is much larger than its .idx, and they take turns in the manifest."""
    files = [*places.glob("data/*/*.bin"), *places.glob("data/*/*.idx")]
    sizes = [path.stat().st_size for path in files]
    assert len(sizes) == 6
    assert max(sizes) > 3 * min(sizes)
    read = [look(places / "data", Share(rank, ranks)).compared_bytes for rank in range(ranks)]
    assert sum(read) == sum(sizes)
    assert max(read) - min(read) <= max(sizes)


def test_each_host_reads_its_own_copy_if_it_has_one(damaged, places, tmp_path):
    found = two_ranks(damaged, places / "tokenizer", tmp_path, local_data=True)
    assert [(one.data.compared, len(one.problems)) for one in found] == [(6, 1), (6, 1)]


def test_missing_datasets_are_one_sentence(places, tmp_path):
    shutil.copytree(places / "data" / "train", tmp_path / "data" / "train")
    (one, _) = two_ranks(tmp_path / "data", None, tmp_path)
    assert len(one.problems) == 1
    assert "holds no datasets validation, test (no manifest.json in them)" in one.problems[0]


def doctor(*words):
    command = [sys.executable, "-m", "megatron_infoentropy", "doctor", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_two_ranks_from_the_command_line_tell_every_trouble_and_end_with_1(
    places, damaged, tmp_path
):
    """The recipe does not fit two ranks, the disk is too small, and more."""
    done = doctor(
        *(RECIPE, "--distributed", "--ranks", 2, "--data", damaged, "--disk-gib", 1e6),
        *("--tokenizer", places / "other", "--run", tmp_path / "new"),
    )
    assert done.returncode == 1, done.stderr
    assert "checksums: " in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout.splitlines()[0].split()[:3] == ["rank", "host", "device"]
    for said in (
        "!!  the recipe cannot be trained on 2 ranks: a global batch of 8 cannot be shared by 2",
        "GiB are free for the run folder, wanted are 1000000.0: make room",
        ".bin is not what was written, its checksum differs from the manifest's: ",
        "the data were made with another tokenizer (SHA-256 ",
        "results right",
        "4 troubles: mend before the training",
    ):
        assert said in done.stdout


@pytest.mark.slow
def test_four_ranks_under_torchrun_measure_the_recipe_and_end_well(places, tmp_path):
    words = [RECIPE, "--distributed", "--data", places / "data", "--run", tmp_path / "new"]
    words += ["--tokenizer", places / "tokenizer", "--disk-gib", 0.001, "--tensor-parallel", 2]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    torchrun += ["--nproc-per-node", 4, "-m", "--", "megatron_infoentropy", "doctor", *words]
    torchrun += ["--", "--micro-batch-size", "4"]
    done = subprocess.run(list(map(str, torchrun)), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for said in ("gradients ", "hidden states ", "loss ", "by the recipe", "ok  4 ranks can work"):
        assert said in done.stdout
    assert done.stdout.count("over 2 ranks: ") == done.stdout.count("results right") == 3


@pytest.mark.slow
def test_a_recipe_that_is_too_large_is_told_before_it_runs_out_of_memory():
    recipe = RECIPE.with_name("paper") / "6.7b.yaml"
    done = doctor(recipe, "--distributed", "--ranks", 2, "--disk-gib", 0, "--", "--num-layers=320")
    assert done.returncode == 1
    assert "GiB of memory are free, the recipe takes" in done.stdout


def test_ranks_that_fail_say_why_and_not_what_torchrun_thinks_of_it():
    noise = "W1123 warning\n"
    ours = "infoentropy: rank 1 (node 0, a) did not come within 1 s\n"
    theirs = (
        'Traceback (most recent call last):\n  File "x.py", line 1, in <module>\n    f()\n'
        "ImportError: no such thing\n"
    )
    torchrun = theirs.replace("ImportError: no such thing", "ChildFailedError: ")
    assert last_words(noise + ours + torchrun) == "rank 1 (node 0, a) did not come within 1 s"
    assert last_words(noise + theirs + torchrun) == "ImportError: no such thing"
    one, zero = ([f"[rank{rank}]: {line}" for line in theirs.splitlines(True)] for rank in (1, 0))
    mixed = [line for pair in zip(one, zero, strict=True) for line in pair]
    for ranks in (one + zero, mixed):
        assert last_words(noise + "".join(ranks) + torchrun) == "ImportError: no such thing"


def test_a_recipe_is_counted_after_what_was_found_on_the_machine(monkeypatch):
    counted = []

    def count(recipe, settings, flags, *, tokenizer):
        counted.append((recipe, settings["tensor-model-parallel-size"], flags, tokenizer))
        return SimpleNamespace(lines=lambda: ["parameters 7"])

    monkeypatch.setattr("megatron_infoentropy.launch.dry_run.dry_run", count)
    words = ["doctor", str(RECIPE), "--tensor-parallel", "2", "--tokenizer", "tok", "--", "--lr"]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0
    assert counted == [(RECIPE, 2, ("--lr",), Path("tok"))]
    assert "megatron-core" in result.output
    assert result.output.endswith("parameters 7\n")
