"""What a log file and a terminal are told of long work, whatever is in the names of a user's."""

import functools
import io
import itertools
import re
from types import SimpleNamespace

import pytest
import rich.console
from rich.table import Table

from megatron_infoentropy import progress as module
from megatron_infoentropy.console import make_console
from megatron_infoentropy.progress import progress, short

NAMES = ["[arxiv]", "[/web]", "[bold]books", "[link=x]y[/link]", ":smile:", "\\[x]", "[1, 2]"]


@pytest.fixture
def shown(monkeypatch):
    """The text of a console that is, or is not, a terminal."""

    def shown(terminal):
        file = io.StringIO()
        make = functools.partial(rich.console.Console, file=file, force_terminal=terminal)
        monkeypatch.setattr(
            rich.console, "Console", lambda **options: make(**options | {"width": 200})
        )
        return file

    return shown


def test_a_log_file_gets_lines_with_rate_and_time_left(shown, monkeypatch):
    monkeypatch.setattr(module, "LINE_EVERY_S", 0.0)
    text = shown(False)
    with progress("read", 2_000_000, "bytes") as advance:
        advance(500_000)
        advance(1_500_000)
    first, second, _ = text.getvalue().splitlines()
    assert re.fullmatch(
        r"read: 500.0k of 2.0M bytes in \d+ s, [\d.]+[MGk]? bytes/s, \d+ s left", first
    )
    assert re.fullmatch(r"read: 2.0M of 2.0M bytes in \d+ s, \S+ bytes/s", second)


def test_work_of_an_earlier_start_is_not_part_of_the_rate(shown, monkeypatch):
    clock = itertools.chain([0.0], itertools.repeat(10.0))
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    monkeypatch.setattr(module, "LINE_EVERY_S", 5.0)
    text = shown(False)
    with progress("train", 500, "steps", before=400) as advance:
        advance(20)
    assert text.getvalue().splitlines()[0] == (
        "train: 420 of 500 steps in 10 s, 2 steps/s, 40 s left"
    )


def test_without_new_work_there_is_no_rate(shown):
    text = shown(False)
    with progress("train", 500, "steps", before=500):
        pass
    assert text.getvalue() == "train: 500 of 500 steps\n"


def test_numbers_are_short():
    numbers = (0, 12.34, 9999, 123_456, 2.5e6, 3e9)
    assert [*map(short, numbers)] == ["0", "12.3", "9999", "123.5k", "2.5M", "3.0G"]


def test_lines_tables_and_their_heads_are_not_markup(capsys):
    table = Table("name", *NAMES, title=NAMES[1])
    for name in NAMES:
        make_console().print(name)
        table.add_row(name)
    make_console(width=200).print(table)
    make_console(stderr=True).print(NAMES[1])
    printed = capsys.readouterr()
    assert printed.out.splitlines()[: len(NAMES)] == NAMES
    assert all(printed.out.count(name) >= 3 for name in NAMES)
    assert printed.err == f"{NAMES[1]}\n"


@pytest.mark.parametrize("terminal", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_progress_is_not_markup_and_a_terminal_gets_a_bar(name, terminal, shown, monkeypatch):
    text = shown(terminal)
    monkeypatch.setattr(module, "LINE_EVERY_S", 0.0)
    with progress(f"train {name}", 10, name) as advance:
        advance(10)
    assert f"train {name}" in text.getvalue()
    assert ("100%" in text.getvalue()) == terminal
