"""The commands, each of which imports its room inside itself, and what several of them share."""

from typing import Annotated

import typer

from megatron_infoentropy.console import make_console

_WIDTH = 1 << 12  # as wide as a table's rows are: in the 80 columns of a log, digits would be cut
out = make_console(width=_WIDTH)
err = make_console(stderr=True, width=_WIDTH)

Overwrite = Annotated[bool, typer.Option("--overwrite", help="replace an existing output")]
