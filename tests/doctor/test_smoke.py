"""`infoentropy doctor --distributed`: ranks that look at each other, and what each trouble says."""

import json
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from typer.testing import CliRunner

from megatron_infoentropy.cli import app
from megatron_infoentropy.data.manifest import DataOptions
from megatron_infoentropy.data.preprocess import preprocess
from megatron_infoentropy.data.tokenizer import train_tokenizer
from megatron_infoentropy.doctor import smoke
from megatron_infoentropy.doctor.smoke import Collective, Facts, JobRank, Order

RECIPE = Path(__file__).parents[2] / "examples" / "tiny.yaml"
GIB = 2**30
SAME = {"torch": "2.15.0", "device": "NVIDIA H200", "data with the manifests": "m"}
HEALTHY = [Facts(rank, f"host{rank}", 80 * GIB, SAME) for rank in range(3)]


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """data/{train,validation,test}, the tokenizer that made them and another one."""
    folder = tmp_path_factory.mktemp("doctor")
    text = "\n".join(json.dumps({"text": f"word{i} " * 40}) for i in range(300)) + "\n"
    (folder / "t.jsonl").write_text(text)
    train_tokenizer(folder / "t.jsonl", folder / "tokenizer", vocab_size=270)
    train_tokenizer(folder / "t.jsonl", folder / "other", vocab_size=265)
    inputs, options = [folder / "t.jsonl"], DataOptions(split_by=None)
    preprocess(inputs, folder / "tokenizer", folder / "data" / "train", options=options)
    for split in ("validation", "test"):
        shutil.copytree(folder / "data" / "train", folder / "data" / split)
    return folder


@pytest.fixture
def damaged(places, tmp_path):
    """The data without the last byte of the test split."""
    data = shutil.copytree(places / "data", tmp_path / "data")
    path = next((data / "test").glob("*.bin"))
    path.write_bytes(path.read_bytes()[:-1])
    return data


def looks(order, ranks=2):
    """What each rank of a job says that has a host for every rank."""
    return [smoke.look(JobRank(rank, ranks, 0, 1), order) for rank in range(ranks)]


def test_conversations_are_read_by_every_rank(tmp_path):
    for split in ("train", "validation"):
        (tmp_path / f"{split}.jsonl").write_text('{"messages": []}\n')
    first, second = looks(Order(data=tmp_path, disk=0))
    assert not first.problems
    assert any("2 data files opened" in line for line in first.seen)
    assert first.same["data with the manifests"] == second.same["data with the manifests"]
    (tmp_path / "validation.jsonl").write_text("{}\n")
    assert "data with the manifests" in smoke.troubles([first, *looks(Order(data=tmp_path))])[0]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"same": SAME | {"torch": "2.14.0"}}, "torch 2.14.0, elsewhere 2.15.0: every host must"),
        ({"same": SAME | {"device": "NVIDIA A100"}}, "device NVIDIA A100, elsewhere NVIDIA H200"),
        ({"clock_s": -7.5}, "its clock is 7.5 s behind rank 0's: synchronise"),
        ({"problems": ["no file"]}, "no file"),
    ],
)
def test_every_fault_is_one_sentence_that_names_the_rank(changes, said):
    assert smoke.troubles(HEALTHY) == []
    (trouble,) = smoke.troubles([*HEALTHY[:2], replace(HEALTHY[2], **changes)])
    assert trouble.startswith("rank 2 (host2): ")
    assert said in trouble


def test_disk_and_memory_that_are_short_are_problems(tmp_path):
    (one,) = looks(Order(run=tmp_path / "new", disk=2**60), 1)
    assert "GiB are free for the run folder, wanted are 1073741824.0: make room" in one.problems[0]
    short = Facts(0, "a", 71 * GIB)
    smoke.require_memory(short, 64 * GIB)
    assert not short.problems
    smoke.require_memory(short, 70 * GIB)
    assert "71.0 GiB of memory are free, the recipe takes 70.0 and a" in short.problems[0]


def two_ranks():
    rank, (work, broken) = dist.get_rank(), (dist.all_reduce, dist.all_reduce)
    ahead = smoke.clock_at_once(time.time if rank == 0 else lambda: time.time() + 5)
    cpu = torch.device("cpu")
    sums, gathers = Collective("r", 4096, 2), Collective("g", 4096, 2, gathers=True)
    done = [smoke.do_collective(each, cpu) for each in (sums, gathers)]
    dist.all_reduce = lambda mine, group: (work(mine, group=group), mine.add_(rank))
    try:
        return ahead, *done, smoke.do_collective(sums, cpu)
    finally:
        dist.all_reduce = broken


def test_two_ranks_see_a_skewed_clock_and_a_wrong_collective():
    (_, *first), (ahead, *second) = run_ranks(two_ranks, 2)
    assert ahead == pytest.approx(5, abs=0.5)
    assert first == second
    (line, wrong), (other, none), (_, trouble) = first
    assert line.startswith("r: all-reduce of 0.00391 MiB over 2 ranks: ")
    assert other.startswith("g: all-gather of 0.00391 MiB over 2 ranks: ")
    assert wrong == none == []
    assert trouble[0].startswith("r: wrong results on ranks 1: ")


def test_sums_over_thousands_of_ranks_are_exact_in_float32():
    pattern, total = smoke.small_numbers(3000), torch.zeros(3000)
    for rank in range(4096):
        total += pattern * (rank % 8 + 1)
    assert torch.equal(total.double(), pattern.double() * sum(range(1, 9)) * 512)


def test_groups_are_those_that_megatron_makes_of_its_world():
    assert smoke.members(2, 1, 8) == [[0, 1], [2, 3], [4, 5], [6, 7]]  # tensor parallel 2
    assert smoke.members(2, 2, 8) == [[0, 2], [1, 3], [4, 6], [5, 7]]  # its data parallel, 2 stages


def test_a_rank_that_does_not_come_is_named_with_its_host_and_a_late_one_waited_for():
    patience = timedelta(seconds=0.1)  # of the store itself
    store = dist.TCPStore("127.0.0.1", 0, 4, True, patience, wait_for_workers=False)
    store.set("doctor/start/2", "b")
    with pytest.raises(RuntimeError) as missing:
        smoke.arrive(store, JobRank(0, 4, 0, 2), "start", 0.3)
    said = str(missing.value)
    assert said.startswith("rank 1 (node 0, ")
    assert "rank 3 (node 1, b) did not come within 0.3 s; 2 of 4 are there" in said
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(smoke.arrive, store, JobRank(0, 2, 0, 2), "look", 60)
        with pytest.raises(TimeoutError):
            waiting.result(timeout=0.3)
        other = dist.TCPStore("127.0.0.1", store.port, 2, False, wait_for_workers=False)
        smoke.arrive(other, JobRank(1, 2, 1, 2), "look", 60)
        waiting.result(timeout=60)


@pytest.fixture
def alone(monkeypatch):
    """The environment of a job's only rank."""
    world = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1, "MASTER_PORT": 0}
    for name, value in ({"MASTER_ADDR": "localhost"} | world).items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)


def test_more_ranks_than_gpus_are_refused(monkeypatch, alone):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ValueError, match="got 2 ranks and 1 GPUs: start fewer ranks there"):
        smoke.examine_job(Order(disk=0), print)


def test_a_rank_of_another_launcher_is_refused(monkeypatch, alone):
    for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name)
    with pytest.raises(ValueError, match="without LOCAL_RANK, LOCAL_WORLD_SIZE: start the ranks"):
        smoke.examine_job(Order(disk=0), print)


def test_nobody_joins_the_others_before_the_recipe_is_planned(monkeypatch, tmp_path, alone):
    """To plan takes a start of Megatron, which can be longer than a rank is waited for."""
    did = []

    def noted(name, do):
        return lambda *words, **options: (did.append(name), do(*words, **options))[1]

    for place, name in ((smoke, "_plan"), (smoke, "arrive"), (dist, "init_process_group")):
        monkeypatch.setattr(place, name, noted(name, getattr(place, name)))
    assert smoke.examine_job(Order(run=tmp_path, disk=0), did.append) == []
    assert did[:4] == ["arrive", "_plan", "arrive", "init_process_group"]


def test_a_recipe_that_cannot_be_read_is_a_trouble(tmp_path):
    *_, (refused,) = smoke._plan(Order(recipe=tmp_path), Facts(0, "a"), 2)
    assert "the recipe cannot be trained on 2 ranks: " in refused


def test_every_rank_opens_every_file(places, damaged, tmp_path):
    ours = Order(data=places / "data", tokenizer=places / "tokenizer", run=tmp_path, disk=0)
    for one in looks(ours):
        assert one.problems == []
        assert one.seen[1] == "  6 data files opened"
    for one in looks(replace(ours, data=damaged)):
        (problem,) = one.problems
        assert "is cut off" in problem


def test_data_and_tokenizer_that_cannot_be_used_are_problems(places, tmp_path):
    shutil.copytree(places / "data" / "train", tmp_path / "data" / "train")
    data, other = tmp_path / "data", places / "other"
    (one,) = looks(Order(data=data, tokenizer=other, run=tmp_path, disk=0), 1)
    for said, split in zip(one.problems[:2], ("validation", "test"), strict=True):
        assert said.startswith(f"{data}/{split} is no token dataset")
    assert "is not the tokenizer that the training data were made with" in one.problems[2]
    next(data.glob("train/*.idx")).unlink()
    (one,) = looks(Order(data=data, tokenizer=tmp_path, run=tmp_path, disk=0), 1)
    assert len(one.problems) == 4
    assert "no such dataset file" in one.problems[0]
    assert "holds no tokenizer.json" in one.problems[3]


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
    assert "Traceback" not in done.stderr
    assert "elastic" not in done.stderr  # torchrun's own account of it
    assert done.stdout.startswith("rank 0 on ")
    for said in (
        "!!  the recipe cannot be trained on 2 ranks: a global batch of 8 cannot be shared by 2",
        "GiB are free for the run folder, wanted are 1000000.0: make room",
        ".bin is cut off: ",
        "is not the tokenizer that the training data were made with",
        "all ranks: all-reduce of 16 MiB over 2 ranks: ",
        "troubles: 4; mend before the training",
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
    for said in ("gradients: ", "hidden states: ", "loss: ", "by the recipe", "ok  all is well"):
        assert said in done.stdout
    assert done.stdout.count("over 2 ranks: ") == 3


def test_what_only_a_look_at_all_ranks_obeys_is_refused_without_it(tmp_path):
    result = CliRunner().invoke(app, ["doctor", "--data", str(tmp_path)])
    assert str(result.exception) == "--data is for --distributed: add that, or leave --data out"


def test_a_recipe_is_counted_after_what_was_found_on_the_machine(monkeypatch):
    counted = []

    def count(recipe, settings, flags, *, tokenizer):
        counted.append((recipe, settings["tensor-model-parallel-size"], flags, tokenizer))
        return "args"

    monkeypatch.setattr("megatron_infoentropy.launch.dry_run.dry_run", count)
    monkeypatch.setattr("megatron_infoentropy.launch.dry_run.report", lambda args: ["parameters 7"])
    words = ["doctor", str(RECIPE), "--tensor-parallel", "2", "--tokenizer", "tok", "--", "--lr"]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0
    assert counted == [(RECIPE, 2, ("--lr",), Path("tok"))]
    assert "megatron-core" in result.output
    assert result.output.endswith("parameters 7\n")
