"""Manifests appear after the tracker has moved; the old goes only when the new is complete."""

import json

import pytest
from saved import ours, save

from megatron_infoentropy import checkpoints
from megatron_infoentropy.checkpoints import (
    MANIFEST,
    TRACKER,
    ManifestWriter,
    choose,
    find_damage,
    iterations,
    with_manifest,
)


@pytest.fixture
def said():
    return []


def train(root, saves, keep_last, said):
    with ManifestWriter(root, keep_last, said.append) as writer:
        for iteration in saves:
            writer.look()
            save(root, iteration, complete=False)
            writer.look()


def test_every_save_gets_a_manifest(tmp_path, said):
    train(tmp_path, (10, 20, 30), None, said)
    assert with_manifest(tmp_path) == iterations(tmp_path) == [10, 20, 30]
    for folder in tmp_path.glob("iter_*"):
        assert find_damage(folder) == ""
        listed = json.loads((folder / MANIFEST).read_text())["files"]
        assert all(len(entry["sha256"]) == 64 for entry in listed.values())
    assert said == []


def test_what_was_there_before_is_left_alone(tmp_path, said):
    save(tmp_path, 10, complete=False)
    train(tmp_path, (20,), None, said)
    assert with_manifest(tmp_path) == [20]


def test_the_last_complete_ones_stay_and_those_before_go(tmp_path, said):
    ours(tmp_path, 10, 20)
    train(tmp_path, (30, 40), 2, said)
    assert iterations(tmp_path) == [30, 40]
    save(tmp_path, 35, complete=False)
    save(tmp_path, 90)
    train(tmp_path, (50,), 1, said)
    assert iterations(tmp_path) == [35, 50, 90], "an unfinished one or a newer one is gone"


def test_what_is_half_deleted_is_no_checkpoint_and_goes_with_the_next(tmp_path, said, monkeypatch):
    def delete_one_file(folder):
        (folder / ".metadata").unlink()
        raise OSError(16, "Device or resource busy")

    ours(tmp_path, 10)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoints.shutil, "rmtree", delete_one_file)
        train(tmp_path, (20,), 1, said)
    assert iterations(tmp_path) == [20]
    assert "could not be deleted: [Errno 16] Device or resource busy" in said[0]
    assert list(tmp_path.glob("*/__0_0.distcp"))[1:], "all of it is gone"
    train(tmp_path, (30,), 1, said)
    assert list(tmp_path.glob("*/__0_0.distcp")) == [tmp_path / "iter_0000030" / "__0_0.distcp"]


def full(*_, **__):
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize(
    ("fails", "complete", "words"),
    [
        ("write_manifest", [10], "does not count as complete: [Errno 28] No space left on device"),
        # As if killed at the first checksum: it was complete before.
        ("file_sha256", [10, 20], "holds sizes without checksums: [Errno 28]"),
    ],
)
def test_nothing_is_deleted_for_one_without_a_whole_manifest(
    tmp_path, said, monkeypatch, fails, complete, words
):
    ours(tmp_path, 10)
    monkeypatch.setattr(checkpoints, fails, full)
    train(tmp_path, (20,), 1, said)
    assert with_manifest(tmp_path) == complete
    assert words in said[0]
    assert choose(tmp_path).name == str(complete[-1])


def test_a_tracker_caught_half_written_is_no_checkpoint_and_a_save_at_the_end_is(tmp_path, said):
    with ManifestWriter(tmp_path, None, said.append) as writer:
        (tmp_path / TRACKER).write_text("")
        writer.look()
        save(tmp_path, 10, complete=False)
    assert with_manifest(tmp_path) == [10]
