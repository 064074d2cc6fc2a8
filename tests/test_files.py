"""Output folders and files: whole or absent, never at the cost of others'; a checkout's commit."""

import errno
import fcntl
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from megatron_infoentropy import files
from megatron_infoentropy.files import (
    commit_of,
    new_folder,
    require_space,
    write_atomically,
    write_whole,
)


def make(output: Path, content: str, *, overwrite: bool = False, fail: bool = False) -> None:
    with new_folder(output, replaceable=("*.bin", "manifest.json"), overwrite=overwrite) as folder:
        (folder / "a.bin").write_text(content)
        assert not (output / "a.bin").exists() or (output / "a.bin").read_text() != content
        if fail:
            raise RuntimeError("stopped")


def entries(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_folder_appears_with_its_parents_when_the_block_ends_or_not_at_all(
    tmp_path: Path,
) -> None:
    with pytest.raises(RuntimeError, match="stopped"):
        make(tmp_path / "deep" / "out", "new", fail=True)
    assert entries(tmp_path / "deep") == []
    make(tmp_path / "deep" / "out", "new")
    assert entries(tmp_path / "deep") == ["out"]
    assert (tmp_path / "deep" / "out" / "a.bin").read_text() == "new"


def test_what_a_killed_run_left_is_replaced(tmp_path: Path) -> None:
    (tmp_path / ".out.partial" / "new").mkdir(parents=True)
    (tmp_path / ".out.partial" / "new" / "half.bin").touch()
    make(tmp_path / "out", "new")
    assert entries(tmp_path) == ["out"]
    assert entries(tmp_path / "out") == ["a.bin"]


def test_what_longer_work_left_stays(tmp_path: Path) -> None:
    (tmp_path / ".out.partial").mkdir()
    (tmp_path / ".out.partial" / "journal").touch()
    make(tmp_path / "out", "new")
    assert entries(tmp_path / ".out.partial") == ["journal", "lock"]


def test_two_runs_do_not_write_the_same_folder(tmp_path: Path) -> None:
    with (
        new_folder(tmp_path / "out", replaceable=(), overwrite=False),
        pytest.raises(ValueError, match=r"another run is writing .*out"),
    ):
        make(tmp_path / "out", "new")
    assert entries(tmp_path) == ["out"]


def test_what_another_run_makes_just_before_the_lock_stays(
    tmp_path: Path, let_another_be_first: Callable[[ModuleType], None]
) -> None:
    let_another_be_first(files)
    with pytest.raises(ValueError, match="not empty"):
        make(tmp_path / "out", "new")
    assert (tmp_path / "out" / "a.bin").read_text() == "other"
    assert entries(tmp_path) == ["out"]


def test_a_file_system_without_locks_is_written_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", refuse)
    make(tmp_path / "out", "new")
    assert entries(tmp_path) == ["out"]


def test_a_mount_point_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "out").mkdir()
    monkeypatch.setattr(Path, "is_mount", lambda path: path == tmp_path / "out")
    with pytest.raises(ValueError, match=r"out is a mount point, .*: name one in it"):
        make(tmp_path / "out", "new")
    assert entries(tmp_path) == ["out"]


def test_overwriting_replaces_the_whole_folder_or_nothing(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()  # an empty one is used
    make(out, "first")
    (out / "manifest.json").touch()
    with pytest.raises(RuntimeError):
        make(out, "second", overwrite=True, fail=True)
    assert entries(out) == ["a.bin", "manifest.json"]
    make(out, "second", overwrite=True)
    assert entries(out) == ["a.bin"]
    assert (out / "a.bin").read_text() == "second"
    assert entries(tmp_path) == ["out"]


@pytest.mark.parametrize(
    ("there", "overwrite", "message"),
    [
        (["a.bin"], False, r"not empty \(it holds a\.bin\)"),
        (["a.bin", "thesis.tex"], True, r"refusing to replace .*: it also holds thesis\.tex"),
        ([], True, r"must be a folder, but .*out is a file"),
    ],
)
def test_what_is_not_to_be_replaced_is_refused_and_stays(
    tmp_path: Path, there: list[str], overwrite: bool, message: str
) -> None:
    out = tmp_path / "out"
    for path in [out / name for name in there] or [out]:
        write_whole(path, "first")
    with pytest.raises(ValueError, match=message):
        make(out, "second", overwrite=overwrite)
    assert (out / "a.bin" if there else out).read_text() == "first"
    assert not there or entries(out) == there


def test_a_link_to_a_folder_keeps_pointing_to_it(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk")
    make(tmp_path / "out", "new")
    assert (tmp_path / "out").is_symlink()
    assert (tmp_path / "disk" / "a.bin").read_text() == "new"


def test_a_file_is_replaced_whole_or_stays_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "new" / "facts.json"
    write_whole(path, "first")
    with pytest.raises(FileNotFoundError), write_atomically(path) as temporary:
        (temporary / "inside a file that is not there").touch()
    assert path.read_text() == "first"
    write_whole(path, b"second", executable=True)
    assert path.read_bytes() == b"second"
    assert path.stat().st_mode & 0o111
    assert entries(path.parent) == ["facts.json"]


def test_a_disk_that_is_too_small_is_said_before_writing(tmp_path: Path) -> None:
    require_space(tmp_path / "not" / "there", 1)
    with pytest.raises(ValueError, match=r"expected 1000000\.00 GB of free space for .*, got"):
        require_space(tmp_path / "out", 10**15)


@pytest.fixture
def package(tmp_path, monkeypatch):
    for name in ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE"):
        monkeypatch.delenv(name, raising=False)
    folder = tmp_path / "checkout" / "package"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("")
    return folder


def git(folder, *words):
    who = ("-c", "user.name=n", "-c", "user.email=e@example.org")
    subprocess.run(["git", *who, *words], cwd=folder, check=True, capture_output=True)


def test_a_checkout_is_at_its_commit_and_says_when_it_is_not(package):
    assert commit_of(package.parent) is None
    results = package.parent / "tools" / "results"
    results.mkdir(parents=True)
    (results / "rows.csv").write_text("a row")
    git(package.parent, "init")
    git(package.parent, "add", ".")
    git(package.parent, "commit", "-m", "first")
    git(package.parent, "tag", "-a", "v1", "-m", "a tag is no commit")
    clean = commit_of(package.parent)
    assert re.fullmatch(r"[0-9a-f]{7,}", clean)
    (results / "rows.csv").write_text("a row more")
    assert commit_of(package.parent) == clean
    (package / "__init__.py").write_text("changed = True")
    assert commit_of(package.parent) == f"{clean}-dirty"


def test_in_another_projects_checkout_or_without_git_there_is_none(package, monkeypatch):
    git(package.parents[1], "init")
    git(package.parents[1], "add", ".")
    git(package.parents[1], "commit", "-m", "theirs")
    assert commit_of(package.parent) is None
    assert commit_of(package.parents[1])
    monkeypatch.setenv("PATH", str(package))
    assert commit_of(package.parents[1]) is None
