"""Progress with a rate and the time left, for anything that takes more than a few seconds."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from megatron_infoentropy.console import make_console

if TYPE_CHECKING:
    from rich.console import Console

Advance = Callable[[int], None]
Detail = Callable[[], str]

LINE_EVERY_S = 20.0  # in a log file


@contextmanager
def progress(
    description: str, total: int | None, unit: str, detail: Detail = str
) -> Iterator[Advance]:
    """Show progress on stderr while the block runs; yields a function to call with the work done.

    `total` is in `unit`s ("tokens", "documents", "bytes", ...), or None where it is not known;
    `detail` is asked for what else there is to say. A terminal gets a bar; a log file gets a line
    every 20 s and one at the end.
    """
    console = make_console(stderr=True, soft_wrap=False)
    report = _bar if console.is_terminal else _lines
    with report(console, description, total, unit, detail) as advance:
        yield advance


@contextmanager
def _bar(
    console: "Console", description: str, total: int | None, unit: str, detail: Detail
) -> Iterator[Advance]:
    from rich.progress import (
        BarColumn,
        Progress,
        ProgressColumn,
        Task,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )
    from rich.text import Text

    class RateColumn(ProgressColumn):
        def render(self, task: Task) -> Text:
            rate = task.finished_speed or task.speed
            return Text("" if rate is None else f"{short(rate)} {unit}/s")

    class DetailColumn(ProgressColumn):
        def render(self, task: Task) -> Text:
            return Text(detail())

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%" if total is not None else "", markup=False),
        RateColumn(),
        DetailColumn(),
        TimeElapsedColumn(),
        TextColumn("elapsed,", markup=False),
        TimeRemainingColumn(),
        TextColumn("left", markup=False),
    )
    with Progress(*columns, console=console) as bar:
        task = bar.add_task(description, total=total)
        yield lambda work: bar.advance(task, work)


@contextmanager
def _lines(
    console: "Console", description: str, total: int | None, unit: str, detail: Detail
) -> Iterator[Advance]:
    start = last = time.monotonic()
    done = 0

    def say() -> None:
        seconds = max(time.monotonic() - start, 1e-9)
        line = f"{description}: {short(done)}"
        if total is not None:
            line += f" of {short(total)}"
        line += f" {unit} in {seconds:.0f} s, {short(done / seconds)} {unit}/s"
        if total is not None and 0 < done < total:
            line += f", {seconds * (total - done) / done:.0f} s left"
        if more := detail():
            line += f"; {more}"
        console.print(line, soft_wrap=True)

    def advance(work: int) -> None:
        nonlocal done, last
        done += work
        if time.monotonic() - last >= LINE_EVERY_S:
            last = time.monotonic()
            say()

    yield advance
    say()


def short(number: float) -> str:
    """A number in four or five characters: 12.3M."""
    for limit, suffix in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if number >= limit:
            return f"{number / limit * (10 if suffix == 'k' else 1):.1f}{suffix}"
    return f"{number:.0f}" if number == int(number) else f"{number:.1f}"
