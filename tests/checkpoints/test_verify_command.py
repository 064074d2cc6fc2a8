"""`infoentropy verify` reads every byte of a checkpoint, or of all below a --save folder."""

import pytest
from saved import ours, save
from typer.testing import CliRunner

from megatron_infoentropy.checkpoints import write_manifest
from megatron_infoentropy.cli import app


@pytest.fixture
def verify():
    return lambda path: CliRunner().invoke(app, ["verify", str(path)])


def test_all_checkpoints_of_a_folder_are_read(tmp_path, verify):
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


def test_one_checkpoint_is_named_by_its_own_folder(tmp_path, verify):
    ours(tmp_path, 10, 20)
    (tmp_path / "iter_0000010" / ".metadata").unlink()
    assert verify(tmp_path / "iter_0000020").exit_code == 0
    assert "1 of 1 checkpoints are damaged" in str(verify(tmp_path / "iter_0000010").exception)
