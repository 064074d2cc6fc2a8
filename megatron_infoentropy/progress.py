"""Progress with a rate and the time left, for anything that takes more than a few seconds."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from megatron_infoentropy.console import make_console

Advance = Callable[[int], None]

LINE_EVERY_S = 20.0  # in a log file
BAR_EVERY_S = 0.1  # on a terminal


@contextmanager
def progress(description: str, total: int | None, unit: str, before: int = 0) -> Iterator[Advance]:
    """Show progress on stderr while the block runs; yields a function to call with the work done.

    `total` is in `unit`s ("tokens", "documents", "bytes", ...), or None where it is not known.
    `before` of them were done earlier: they are shown as done and are not part of the rate. A log
    file gets a line every 20 s and one at the end; a terminal the line all the time, with a bar.
    """
    from rich.progress import BarColumn, Progress, TextColumn
    from rich.table import Column

    console = make_console(stderr=True, soft_wrap=False)
    is_terminal = console.is_terminal
    start = last = time.monotonic()
    done = before

    def say() -> None:
        line = f"{description}: {short(done)}"
        if total is not None:
            line += f" of {short(total)}"
        line += f" {unit}"
        if done > before:
            seconds = max(time.monotonic() - start, 1e-9)
            rate = (done - before) / seconds
            line += f" in {seconds:.0f} s, {short(rate)} {unit}/s"
            if total is not None and done < total:
                line += f", {(total - done) / rate:.0f} s left"
        if is_terminal:
            bar.update(task, completed=done, description=line)
        else:
            console.print(line, soft_wrap=True)

    def advance(work: int) -> None:
        nonlocal done, last
        done += work
        if time.monotonic() - last >= (BAR_EVERY_S if is_terminal else LINE_EVERY_S):
            last = time.monotonic()
            say()

    percent = "{task.percentage:>3.0f}%" if total is not None else ""
    said = TextColumn("{task.description}", markup=False, table_column=Column())
    columns = (BarColumn(bar_width=20), TextColumn(percent, markup=False), said)
    with Progress(*columns, console=console, disable=not is_terminal) as bar:
        task = bar.add_task(description, total=total, completed=before)
        yield advance
        say()


def short(number: float) -> str:
    """A number in four or five characters: 12.3M."""
    for limit, suffix in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if number >= limit:
            return f"{number / limit * (10 if suffix == 'k' else 1):.1f}{suffix}"
    return f"{number:.0f}" if number == int(number) else f"{number:.1f}"
