"""A manifest vouches for every byte of a checkpoint, which `infoentropy verify` reads, no other."""

import json
import os

import pytest
from saved import ours, save
from typer.testing import CliRunner

from megatron_infoentropy import checkpoints
from megatron_infoentropy.checkpoints import MANIFEST, find_damage, write_manifest
from megatron_infoentropy.cli import app


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


@pytest.mark.parametrize("has_checksums", [True, False])
def test_sizes_alone_read_no_file(folder, has_checksums):
    write_manifest(folder, checksums=has_checksums)
    listed = json.loads((folder / MANIFEST).read_text())["files"]
    assert listed["rank/0.pt"]["bytes"] == 5
    assert (listed["rank/0.pt"]["sha256"] is not None) == has_checksums
    path = folder / "__0_0.distcp"
    path.write_bytes(bytes(10240))
    assert find_damage(folder, checksums=False) == ""
    assert ("SHA-256" in find_damage(folder)) == has_checksums
    path.write_bytes(b"")
    assert find_damage(folder) == f"{path} has 0 bytes, not 10240"


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


def verify(path):
    return CliRunner().invoke(app, ["verify", str(path)])


def test_all_checkpoints_of_a_folder_are_read(tmp_path):
    ours(tmp_path, 10, 20)
    write_manifest(save(tmp_path, 30, complete=False), checksums=False)
    done = verify(tmp_path)
    assert done.exit_code == 0
    said = "".join(done.output.split("\n"))
    assert "iter_0000010: ok" in said
    assert "iter_0000030: the sizes are right; no checksums" in said
    path = tmp_path / "iter_0000010" / "__0_0.distcp"
    path.write_bytes(bytes(10240))
    done = verify(tmp_path)
    said = "".join(done.output.split("\n"))
    assert f"{path} has another SHA-256 than when it was saved" in said
    assert "iter_0000020: ok" in said
    assert "1 of 3 checkpoints are damaged: copy them again" in str(done.exception)


def test_one_checkpoint_is_named_by_its_own_folder(tmp_path):
    ours(tmp_path, 10, 20)
    (tmp_path / "iter_0000010" / ".metadata").unlink()
    assert verify(tmp_path / "iter_0000020").exit_code == 0
    assert "1 of 1 checkpoints are damaged" in str(verify(tmp_path / "iter_0000010").exception)
