"""Finished steps are proven by what they wrote, whose files are read again only once touched."""

import json
import os
from pathlib import Path

import pytest

from megatron_infoentropy.study import ledger
from megatron_infoentropy.study.ledger import Step, read_progress, run_steps
from megatron_infoentropy.study.plan import StudyError


@pytest.fixture
def work(tmp_path):
    """Two steps of which the second copies the first; `done` names what was done."""
    folder, done = tmp_path / "run", []

    def write(name: str, source: str | None = None) -> None:
        done.append(name)
        (folder / name).mkdir(exist_ok=True)
        text = "x" if source is None else (folder / source / "file").read_text()
        (folder / name / "file").write_text(text)

    def steps(first=1, second=1):
        return [
            Step("one", first, ("a",), lambda: write("a")),
            Step("two", second, ("b",), lambda: write("b", "a")),
        ]

    return folder, steps, done


@pytest.fixture
def read(monkeypatch):
    """Paths of the files that were read."""
    paths, real = [], ledger.hashlib.file_digest

    def file_digest(file, name):
        paths.append(Path(file.name))
        return real(file, name)

    monkeypatch.setattr(ledger.hashlib, "file_digest", file_digest)
    return paths


def test_what_is_finished_is_neither_done_nor_read_again_until_it_is_touched(work, read):
    folder, steps, done = work
    first = run_steps(folder, steps(), "")
    read.clear()
    assert read_progress(folder, steps(), "").done == ("one", "two")
    assert read == []
    os.utime(folder / "a" / "file", (0, 0))
    assert run_steps(folder, steps(), "") == first
    assert read == [folder / "a" / "file"]  # now its new time is recorded
    assert read_progress(folder, steps(), "").digest == first
    assert len(read) == 1
    assert done == ["a", "b"]


@pytest.mark.parametrize("damage", ["changed", "longer", "missing", "added"])
def test_an_output_that_is_not_what_was_written_is_made_again(work, damage):
    folder, steps, done = work
    run_steps(folder, steps(), "")
    file = folder / "b" / "file"
    times = file.stat()
    match damage:
        case "changed":
            file.write_text("y")
            os.utime(file, (0, 0))  # clocks of files tick every few milliseconds
        case "longer":
            file.write_text("xx")
            os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
        case "missing":
            file.unlink()
        case "added":
            (folder / "b" / "other").write_text("")
    assert read_progress(folder, steps(), "").done == ("one",)
    run_steps(folder, steps(), "")
    assert done == ["a", "b", "b"]
    assert file.read_text() == "x"


def test_other_inputs_redo_the_step_and_what_builds_upon_it(work):
    folder, steps, done = work
    run_steps(folder, steps(), "")
    run_steps(folder, steps(second=2), "")
    run_steps(folder, steps(first=2, second=2), "")
    run_steps(folder, steps(first=2, second=2), "other data")
    assert done == ["a", "b", "b", "a", "b", "a", "b"]


def test_a_step_that_was_ended_is_done_again_and_finds_its_own_leftovers_only(work):
    folder, steps, _ = work
    found = []

    def ended() -> None:
        found.append((folder / "b").exists())
        (folder / "b").mkdir(exist_ok=True)
        raise KeyboardInterrupt

    def attempt(inputs: int) -> None:
        with pytest.raises(KeyboardInterrupt):
            run_steps(folder, [steps()[0], Step("two", inputs, ("b",), ended)], "")

    attempt(1)
    attempt(1)
    assert found == [False, True]
    attempt(2)
    assert found[-1] is False
    assert read_progress(folder, steps(), "").done == ("one",)


def test_a_folder_of_somebody_else_is_left_alone(work):
    folder, steps, done = work
    folder.mkdir()
    (folder / "thesis").write_text("years of work")
    with pytest.raises(StudyError, match="did not make"):
        run_steps(folder, steps(), "")
    assert done == []
    assert [path.name for path in folder.iterdir()] == ["thesis"]


def test_a_folder_whose_first_write_was_killed_is_gone_on_with(work):
    folder, steps, done = work
    folder.mkdir()
    (folder / ".study.json.123.tmp").touch()
    run_steps(folder, steps(), "")
    assert done == ["a", "b"]


def test_two_processes_do_not_work_in_one_folder(work):
    folder, steps, _ = work

    def again() -> None:
        with pytest.raises(StudyError, match="another process"):
            run_steps(folder, steps(), "")
        (folder / "c").write_text("")

    run_steps(folder, [Step("outer", 1, ("c",), again)], "")


@pytest.mark.parametrize("content", [{"format": 1}, {"steps": {"one": {"outputs": {"a": [1]}}}}])
def test_a_damaged_ledger_is_named(work, content):
    folder, steps, _ = work
    run_steps(folder, steps(), "")
    (folder / "study.json").write_text(json.dumps(content))
    with pytest.raises(StudyError, match=r"remove .* to begin it anew"):
        run_steps(folder, steps(), "")
