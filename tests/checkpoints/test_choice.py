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


def test_a_complete_one_is_loaded_without_a_word(tmp_path):
    assert choose(ours(tmp_path, 10, 20)) == Choice("20")


def test_nothing_is_loaded_where_nothing_is(tmp_path):
    assert choose(tmp_path / "new") == Choice(None)
    begin_record(tmp_path / "new")
    assert choose(tmp_path / "new") == Choice(None)


def test_a_damaged_one_gives_way_to_the_newest_complete_one_before(tmp_path):
    ours(tmp_path, 10, 20, 30)
    path = damage(tmp_path / "iter_0000030")
    choice = choose(tmp_path)
    assert (choice.name, choice.changes_tracker) == ("20", True)
    assert choice.warning == (
        f"{path} has 10239 bytes, not 10240: training goes on from "
        f"{tmp_path}/iter_0000020, the newest complete one before"
    )
    damage(tmp_path / "iter_0000020")
    assert choose(tmp_path).name == "10"


def test_one_that_is_newer_than_the_tracker_is_never_taken(tmp_path):
    ours(tmp_path, 10, 20, 30)
    (tmp_path / TRACKER).write_text("20")
    damage(tmp_path / "iter_0000020")
    assert choose(tmp_path).name == "10"


def test_one_of_which_nothing_is_known_gives_way(tmp_path):
    ours(tmp_path, 10)
    save(tmp_path, 20, complete=False)
    choice = choose(tmp_path)
    assert choice.name == "10"
    assert f"iter_0000020 has no {MANIFEST}, since the training ended before all" in choice.warning


def test_one_whose_checksums_were_never_made_is_loaded_when_its_sizes_are_true(tmp_path):
    ours(tmp_path, 10)
    folder = save(tmp_path, 20, complete=False)
    write_manifest(folder, checksums=False)
    choice = choose(tmp_path)
    assert choice == Choice("20")
    (folder / ".metadata").write_bytes(b"")
    assert choose(tmp_path).name == "10"


@pytest.mark.parametrize("words", ["", "2x", "-1", "9" * 30, "\0"])
def test_a_damaged_tracker_is_overruled_by_the_newest_complete_one(tmp_path, words):
    ours(tmp_path, 10, 20)
    save(tmp_path, 30, complete=False)
    (tmp_path / TRACKER).write_text(words)
    choice = choose(tmp_path)
    assert choice.name == "20"
    assert f"{TRACKER} is damaged" in choice.warning
    point_tracker(tmp_path, choice.name)
    assert choose(tmp_path) == Choice("20")


def test_where_the_first_was_interrupted_training_starts_anew(tmp_path):
    begin_record(tmp_path)
    save(tmp_path, 10, complete=False)
    choice = choose(tmp_path)
    assert (choice.name, choice.changes_tracker) == (None, True)
    assert "no complete one stands before it: training starts at iteration 0" in choice.warning
    point_tracker(tmp_path, choice.name)
    assert choose(tmp_path) == Choice(None)


def test_where_all_are_damaged_nothing_is_loaded_or_begun(tmp_path):
    ours(tmp_path, 10, 20)
    paths = [damage(tmp_path / f"iter_00000{it}0") for it in (1, 2)]
    with pytest.raises(DamagedCheckpointError, match="no complete checkpoint stands") as error:
        choose(tmp_path)
    assert all(str(path) in str(error.value) for path in paths)


def test_a_checkpoint_of_the_tracker_that_is_gone_gives_way(tmp_path):
    ours(tmp_path, 10)
    (tmp_path / TRACKER).write_text("20")
    assert "iter_0000020 is not there: training goes on from" in choose(tmp_path).warning


def test_a_named_step_has_no_stand_in(tmp_path):
    ours(tmp_path, 10, 20)
    assert choose(tmp_path, 10) == Choice("10")
    damage(tmp_path / "iter_0000010")
    with pytest.raises(DamagedCheckpointError, match="has 10239 bytes, not 10240"):
        choose(tmp_path, 10)
    with pytest.raises(DamagedCheckpointError, match="iter_0000015 is not there"):
        choose(tmp_path, 15)


def test_what_megatron_alone_saved_is_loaded_with_a_warning(tmp_path):
    save(tmp_path, 10, complete=False)
    choice = choose(tmp_path)
    assert choice.name == "10"
    assert "since Megatron alone saved it: it is loaded unverified" in choice.warning
    begin_record(tmp_path)  # training goes on in the same folder
    assert choose(tmp_path) == choice
    save(tmp_path, 20)
    damage(tmp_path / "iter_0000020")
    assert choose(tmp_path).name == "10"


def test_what_megatron_alone_left_half_written_is_not_taken_for_whole(tmp_path):
    save(tmp_path, 20, complete=False)
    save(tmp_path, 10, complete=False)  # the tracker never came to 20
    begin_record(tmp_path)
    (tmp_path / TRACKER).write_text("20")
    assert choose(tmp_path).name == "10"


def test_an_imported_model_can_be_gone_back_to(tmp_path):
    save(tmp_path, 0, complete=False).rename(tmp_path / "release")
    (tmp_path / TRACKER).write_text("release")
    assert choose(tmp_path).name == "release"
    begin_record(tmp_path)
    save(tmp_path, 10, complete=False)
    assert choose(tmp_path).name == "release"


def test_a_tracker_that_was_removed_means_a_new_start_and_a_hint(tmp_path):
    ours(tmp_path, 10, 20)
    (tmp_path / TRACKER).unlink()
    choice = choose(tmp_path)
    assert (choice.name, choice.changes_tracker) == (None, False)
    assert "to go on from iteration 20, write this number into it" in choice.warning


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
    ours(tmp_path, *complete)
    save(tmp_path, 30, complete=False)
    context = multiprocessing.get_context("fork")  # which imports nothing again
    barrier = context.Barrier(4)
    ranks = [
        context.Process(target=choose_as_rank, args=(tmp_path, barrier, rank)) for rank in range(4)
    ]
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
