"""The commands, each of which imports its room inside itself, and what several of them share."""

from typing import Annotated

import typer

from megatron_infoentropy.console import make_console

out = make_console()
err = make_console(stderr=True)

Overwrite = Annotated[bool, typer.Option("--overwrite", help="replace an existing output")]
