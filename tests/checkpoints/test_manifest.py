"""A manifest vouches for every byte of a checkpoint, for nothing outside of it."""

import json
import os

import pytest
from saved import save

from megatron_infoentropy import checkpoints
from megatron_infoentropy.checkpoints import MANIFEST, find_damage, write_manifest


@pytest.fixture
def folder(tmp_path):
    return save(tmp_path, 10)


def test_a_checkpoint_as_it_was_saved_is_true(folder):
    assert find_damage(folder) == ""
    listed = json.loads((folder / MANIFEST).read_text())["files"]
    assert set(listed) == {".metadata", "__0_0.distcp", "rank/0.pt"}
    assert listed["__0_0.distcp"]["bytes"] == 10240


def test_every_flipped_byte_of_every_file_is_found(folder):
    for name in (".metadata", "rank/0.pt"):
        path = folder / name
        data = path.read_bytes()
        for at in range(len(data)):
            path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
            assert find_damage(folder) == f"{path} has another SHA-256 than when it was saved"
        path.write_bytes(data)
    assert find_damage(folder) == ""


def test_a_file_that_is_cut_off_longer_or_gone_is_named(folder):
    path = folder / "__0_0.distcp"
    data = path.read_bytes()
    for other in (data[:-1], b"", data + b"x"):
        path.write_bytes(other)
        for checksums in (True, False):
            said = find_damage(folder, checksums=checksums)
            assert said == f"{path} has {len(other)} bytes, not 10240"
    path.unlink()
    assert find_damage(folder) == f"{path} cannot be read: No such file or directory"


def test_sizes_alone_read_no_file(folder):
    path = folder / "__0_0.distcp"
    path.write_bytes(bytes(10240))
    assert find_damage(folder, checksums=False) == ""
    assert "SHA-256" in find_damage(folder)


def test_sizes_without_checksums_are_compared(folder):
    write_manifest(folder, checksums=False)
    listed = json.loads((folder / MANIFEST).read_text())["files"]
    assert listed["rank/0.pt"] == {"bytes": 5, "sha256": None}
    assert find_damage(folder) == ""
    (folder / "rank" / "0.pt").write_bytes(b"stat")
    assert find_damage(folder).endswith("0.pt has 4 bytes, not 5")


@pytest.mark.parametrize("checksums", [True, False])
def test_all_is_on_the_disk_before_the_manifest(folder, monkeypatch, checksums):
    (folder / MANIFEST).unlink()
    synced, sync = set(), os.fsync

    def fsync(descriptor):
        if not (folder / MANIFEST).exists():
            synced.add(os.fstat(descriptor).st_ino)
        sync(descriptor)

    monkeypatch.setattr(checkpoints.os, "fsync", fsync)
    write_manifest(folder, checksums=checksums)
    assert {path.stat().st_ino for path in [folder.parent, folder, *folder.rglob("*")]} <= synced


def test_a_damaged_manifest_vouches_for_nothing(folder):
    path = folder / MANIFEST
    data = path.read_bytes()
    for at in range(len(data)):  # cut off anywhere (but for the newline at its end)
        if at < len(data) - 1:
            path.write_bytes(data[:at])
            assert f"{path} is damaged" in find_damage(folder)
    path.write_bytes(data.replace(b'"format": 1', b'"format": 2'))
    assert "expected format 1, got 2" in find_damage(folder)


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "rank/../../secret", ""])
def test_a_manifest_cannot_have_files_read_outside_of_its_folder(folder, name):
    entry = {"bytes": 1, "sha256": "0"}
    (folder / MANIFEST).write_text(json.dumps({"format": 1, "files": {name: entry}}))
    assert "lies outside of the checkpoint" in find_damage(folder)


def test_a_manifest_that_cannot_be_written_leaves_the_old_one(folder, monkeypatch):
    before = (folder / MANIFEST).read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoints.os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_manifest(folder)
    assert (folder / MANIFEST).read_bytes() == before
