"""Which checkpoint is loaded when the newest one is damaged, unfinished, or somebody else's."""

import multiprocessing
import os
from contextlib import redirect_stdout
from io import StringIO

import pytest
import torch.distributed as dist
from ranks import run_ranks
from saved import ours, save

from megatron_infoentropy.checkpoints import (
    MANIFEST,
    RELEASE,
    TRACKER,
    Choice,
    DamagedCheckpointError,
    begin_record,
    choose,
    point_tracker,
    read_tracker,
    write_manifest,
)
from megatron_infoentropy.integration.checkpoints import (
    checkpoint_flags,
    choose_checkpoint,
    warn,
)


def damage(folder):
    path = folder / "__0_0.distcp"
    path.write_bytes(path.read_bytes()[:-1])
    return path


def happen(root, events):
    """Have a --save folder go through this, event by event."""
    for event in filter(None, events.split(", ")):
        match event.split(" "):
            case ["manifests"]:  # are written from now on
                begin_record(root)
            case ["untracked"]:
                (root / TRACKER).unlink()
            case ["tracker", words]:
                (root / TRACKER).write_text(words)
            case ["import"]:
                save(root, 0, complete=False).rename(root / RELEASE)
                (root / TRACKER).write_text(RELEASE)
            case [iteration, *how]:
                folder = save(root, int(iteration), complete=how in ([], ["damaged"]))
                if how == ["damaged"]:
                    damage(folder)
                if how == ["sizes"]:
                    write_manifest(folder, checksums=False)


GOES_ON = "training goes on from {root}/iter_00000{name}, the newest complete one before"
CUT = "__0_0.distcp has 10239 bytes, not 10240"
UNFINISHED = f"has no {MANIFEST}, since the training ended before all files were known to be on"
UNVERIFIED = "since Megatron alone saved it: it is loaded unverified"


@pytest.mark.parametrize(
    ("events", "name", "words"),
    [
        ("", None, ""),
        ("manifests", None, ""),
        ("manifests, 10, 20", "20", ""),
        ("manifests, 10, 20, 30 damaged", "20", f"{CUT}: {GOES_ON}"),
        ("manifests, 10, 20 damaged, 30 damaged", "10", f"{CUT}: {GOES_ON}"),
        ("manifests, 10, 20 damaged, 30, tracker 20", "10", f"{CUT}: {GOES_ON}"),  # not a newer one
        ("manifests, 10, 20 unfinished", "10", UNFINISHED),
        ("manifests, 10, 20 sizes", "20", ""),
        *(
            (f"manifests, 10, 20, 30 unfinished, tracker {words}", "20", f"{TRACKER} is damaged: ")
            for words in ("", "2x", "-1", "9" * 30, "\0")
        ),
        ("manifests, 10, tracker 20", "10", f"iter_0000020 is not there: {GOES_ON}"),
        ("manifests, 10 unfinished", None, "before it: training starts at iteration 0"),
        ("manifests, 10, 20, untracked", None, "to go on from iteration 20, write this number"),
        ("10 unfinished", "10", UNVERIFIED),
        ("10 unfinished, manifests", "10", UNVERIFIED),
        ("10 unfinished, manifests, 20 damaged", "10", f"{CUT}: {GOES_ON}"),
        # Half written by Megatron alone, whose tracker never came to it.
        ("20 unfinished, 10 unfinished, manifests, tracker 20", "10", UNFINISHED),
        ("import", RELEASE, UNVERIFIED),
        ("import, manifests, 10 unfinished", RELEASE, UNFINISHED),
    ],
)
def test_the_newest_complete_one_is_loaded_and_why_is_said(tmp_path, events, name, words):
    happen(tmp_path, events)
    choice = choose(tmp_path)
    assert choice.name == name
    assert words.format(root=tmp_path, name=name) in choice.warning
    assert bool(words) == bool(choice.warning)
    assert choice.changes_tracker == (read_tracker(tmp_path) not in (name, None))
    if choice.changes_tracker:
        point_tracker(tmp_path, choice.name)
        again = choose(tmp_path)
        assert again.name == name
        assert not again.changes_tracker


def test_a_file_that_is_cut_off_counts_where_checksums_were_never_made(tmp_path):
    happen(tmp_path, "manifests, 10, 20 sizes")
    (tmp_path / "iter_0000020" / ".metadata").write_bytes(b"")
    assert choose(tmp_path).name == "10"


def test_where_all_are_damaged_nothing_is_loaded_or_begun(tmp_path):
    happen(tmp_path, "manifests, 10 damaged, 20 damaged")
    with pytest.raises(DamagedCheckpointError, match="no complete checkpoint stands") as error:
        choose(tmp_path)
    for iteration in (1, 2):
        assert f"{tmp_path}/iter_00000{iteration}0/{CUT}" in str(error.value)


def test_a_named_step_has_no_stand_in(tmp_path):
    happen(tmp_path, "manifests, 10, 20, 30 damaged")
    assert choose(tmp_path, 10) == Choice("10")
    for step, words in ((30, CUT), (15, "iter_0000015 is not there")):
        with pytest.raises(DamagedCheckpointError, match=words):
            choose(tmp_path, step)


@pytest.fixture
def start(tmp_path, monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.chdir(tmp_path)
    return lambda words: choose_checkpoint(checkpoint_flags(words.split()))


@pytest.mark.parametrize("flag", ["--load", "--pretrained-checkpoint"])
@pytest.mark.parametrize("ours_is", ["", " --save=mine"])
def test_the_tracker_of_another_training_is_left_alone(tmp_path, start, flag, ours_is):
    theirs = ours(tmp_path / "theirs", 10)
    save(theirs, 20, complete=False)  # or not complete yet
    with pytest.raises(DamagedCheckpointError, match=r"left alone: .* --ckpt-step 10, or write 10"):
        start(f"{flag}=theirs{ours_is}")
    assert (theirs / TRACKER).read_text() == "20"
    start(f"{flag}=theirs --ckpt-step=10{ours_is}")
    damage(theirs / "iter_0000010")
    with pytest.raises(DamagedCheckpointError, match="has 10239 bytes, not 10240"):
        start(f"{flag}=theirs --ckpt-step=10{ours_is}")
    (theirs / "iter_0000010").rename(tmp_path / "gone")
    with pytest.raises(DamagedCheckpointError, match=r"left alone, and no complete"):
        start(f"{flag}=theirs{ours_is}")
    assert (theirs / TRACKER).read_text() == "20"


def test_what_is_not_a_folder_is_not_tidied(start):
    start("--save=mine --infoentropy-keep-last=2")
    with pytest.raises(ValueError, match="in folders alone, and --save is msc://x: leave it out"):
        start("--save=msc://x --infoentropy-keep-last=2")


def test_the_same_folder_under_another_name_is_ours(tmp_path, start):
    save(ours(tmp_path / "mine", 10), 20, complete=False)
    (tmp_path / "link").symlink_to("mine")
    start(f"--load=link --save={tmp_path / 'mine'}")
    assert (tmp_path / "mine" / TRACKER).read_text() == "10"


def test_a_pretrained_model_is_looked_at_only_where_megatron_loads_it(tmp_path, start):
    damage(save(ours(tmp_path / "theirs"), 10))
    words = "--load=mine --save=mine --pretrained-checkpoint=theirs"
    with pytest.raises(DamagedCheckpointError, match="theirs"):
        start(words)
    ours(tmp_path / "mine", 10)
    start(words)


def choose_as_rank(folder, barrier, rank):
    os.environ["RANK"] = str(rank)
    barrier.wait()
    for _ in range(20):
        choose_checkpoint(checkpoint_flags([f"--load={folder}", f"--save={folder}"]))


@pytest.mark.parametrize(("complete", "left"), [((10, 20), "20"), ((), None)])
def test_ranks_that_choose_at_once_come_to_the_same(tmp_path, complete, left):
    """Some look before another one has set the tracker, some after."""
    save(ours(tmp_path, *complete), 30, complete=False)
    context = multiprocessing.get_context("fork")  # which imports nothing again
    barrier = context.Barrier(4)
    arguments = [(tmp_path, barrier, rank) for rank in range(4)]
    ranks = [context.Process(target=choose_as_rank, args=each) for each in arguments]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(60)
    assert [rank.exitcode for rank in ranks] == [0] * 4
    assert read_tracker(tmp_path) == left
    assert not list(tmp_path.glob("*.tmp"))


def choose_after_rank_1(folder):
    """Return what this rank prints of a choice that rank 0 makes when rank 1 has made its own."""
    os.environ["RANK"] = str(dist.get_rank())
    warnings = []
    for rank in (1, 0):
        if rank == dist.get_rank():
            warnings = choose_checkpoint(checkpoint_flags([f"--load={folder}", f"--save={folder}"]))
        dist.barrier()
    with redirect_stdout(StringIO()) as said:
        warn(warnings, [])
    return said.getvalue()


def test_rank_0_says_it_where_another_one_was_quicker(tmp_path):
    path = damage(ours(tmp_path, 10, 20) / "iter_0000020")
    first, second = run_ranks(choose_after_rank_1, 2, tmp_path)
    assert first.count(f"WARNING: {path} has 10239 bytes, not 10240: training goes on") == 1
    assert second == ""
