"""Names of a user's are printed as they are, whatever a console would read in them."""

import io

import pytest
import rich.console
from rich.table import Table

from megatron_infoentropy import progress as module
from megatron_infoentropy.console import make_console
from megatron_infoentropy.progress import progress

NAMES = ["[arxiv]", "[/web]", "[bold]books", "[link=x]y[/link]", ":smile:", "\\[x]", "[1, 2]"]


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


@pytest.mark.parametrize("is_terminal", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_progress_is_not_markup(name, is_terminal, monkeypatch):
    file = io.StringIO()

    class Shown(rich.console.Console):
        def __init__(self, **options):
            super().__init__(**options | {"file": file, "width": 200}, force_terminal=is_terminal)

    monkeypatch.setattr(rich.console, "Console", Shown)
    monkeypatch.setattr(module, "LINE_EVERY_S", 0.0)
    with progress(f"train {name}", 10, name) as advance:
        advance(10)
    assert f"train {name}" in file.getvalue()
