"""The commit of the package's files: only of a checkout of the package itself."""

import re
import subprocess

import pytest

from megatron_infoentropy.launch.run_folder import revision_of


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
    assert revision_of(package) is None
    git(package.parent, "init")
    git(package.parent, "add", ".")
    git(package.parent, "commit", "-m", "first")
    git(package.parent, "tag", "-a", "v1", "-m", "a tag is no commit")
    clean = revision_of(package)
    assert re.fullmatch(r"[0-9a-f]{7,}", clean)
    (package / "__init__.py").write_text("changed = True")
    assert revision_of(package) == f"{clean}-dirty"


def test_another_projects_commit_is_not_ours(package):
    git(package.parents[1], "init")
    git(package.parents[1], "add", ".")
    git(package.parents[1], "commit", "-m", "theirs")
    assert revision_of(package) is None


def test_without_git_there_is_none(package, monkeypatch):
    git(package.parent, "init")
    monkeypatch.setenv("PATH", str(package))
    assert revision_of(package) is None
