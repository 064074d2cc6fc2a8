"""Output folders: whole or absent, and never at the cost of somebody else's files."""

from pathlib import Path

import pytest

from megatron_infoentropy.data.folder import new_folder


def make(output: Path, content: str, *, overwrite: bool = False, fail: bool = False) -> None:
    with new_folder(output, replaceable=("*.bin", "manifest.json"), overwrite=overwrite) as folder:
        (folder / "a.bin").write_text(content)
        assert not (output / "a.bin").exists() or (output / "a.bin").read_text() != content
        if fail:
            raise RuntimeError("stopped")


def entries(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_folder_appears_with_its_parents_when_the_block_ends(tmp_path: Path) -> None:
    make(tmp_path / "deep" / "out", "new")
    assert entries(tmp_path / "deep") == ["out"]
    assert (tmp_path / "deep" / "out" / "a.bin").read_text() == "new"


def test_a_failed_block_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="stopped"):
        make(tmp_path / "out", "new", fail=True)
    assert entries(tmp_path) == []


def test_an_empty_folder_is_used_and_a_full_one_refused(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    make(tmp_path / "out", "first")
    with pytest.raises(ValueError, match=r"not empty \(it holds a\.bin\)"):
        make(tmp_path / "out", "second")
    assert (tmp_path / "out" / "a.bin").read_text() == "first"


def test_overwriting_replaces_the_whole_folder_or_nothing(tmp_path: Path) -> None:
    out = tmp_path / "out"
    make(out, "first")
    (out / "manifest.json").touch()
    with pytest.raises(RuntimeError):
        make(out, "second", overwrite=True, fail=True)
    assert entries(out) == ["a.bin", "manifest.json"]
    make(out, "second", overwrite=True)
    assert entries(out) == ["a.bin"]
    assert (out / "a.bin").read_text() == "second"
    assert entries(tmp_path) == ["out"]


def test_overwriting_never_deletes_what_is_not_such_an_output(tmp_path: Path) -> None:
    out = tmp_path / "out"
    make(out, "first")
    (out / "thesis.tex").touch()
    with pytest.raises(ValueError, match=r"refusing to replace .*: it also holds thesis\.tex"):
        make(out, "second", overwrite=True)
    assert entries(out) == ["a.bin", "thesis.tex"]


def test_a_file_in_the_way_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out").touch()
    with pytest.raises(ValueError, match=r"must be a folder, but .*out is a file"):
        make(tmp_path / "out", "new")


def test_a_link_to_a_folder_keeps_pointing_to_it(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk")
    make(tmp_path / "out", "new")
    assert (tmp_path / "out").is_symlink()
    assert (tmp_path / "disk" / "a.bin").read_text() == "new"
