"""The one place where consoles are made: names of a user's are printed as they are.

Rich reads `[x]` as markup and `:x:` as an emoji in whatever it prints, tables included. Nothing
that this package prints is meant as either, so every console has both switched off.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console


def make_console(
    *, stderr: bool = False, width: int | None = None, soft_wrap: bool = True
) -> "Console":
    """Return a console that prints text as it is; with `soft_wrap` in lines of any length."""
    from rich.console import Console

    return Console(
        stderr=stderr,
        width=width,
        soft_wrap=soft_wrap,
        markup=False,
        emoji=False,
        highlight=False,
    )
