"""The `infoentropy` command. Each command imports its room inside itself: all start fast."""

import sys
from typing import Annotated

import typer
from rich.console import Console

from megatron_infoentropy import __version__
from megatron_infoentropy.commands import (
    convert,
    data,
    evaluation,
    launch,
    machine,
    recipe_bench,
    study,
    tasks,
    training,
)

app = typer.Typer(
    name="infoentropy",
    help="Pre-train with the InfoEntropy (MiLe) loss: data, training, conversion, evaluation.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def main() -> None:
    """Run the command line; an expected error is one sentence on stderr and exit code 1."""
    try:
        app()
    except (ValueError, RuntimeError, OSError) as error:
        Console(stderr=True, highlight=False, soft_wrap=True).print(
            f"infoentropy: {error}", markup=False
        )
        sys.exit(1)


@app.callback(invoke_without_command=True)
def about(
    show_version: Annotated[bool, typer.Option("--version", help="print the version")] = False,
) -> None:
    if show_version:
        Console().print(__version__)
        raise typer.Exit


# In the order of the work, as --help lists them.
for _room in (data, training, launch, convert, evaluation, tasks, study, machine, recipe_bench):
    for _command in _room.COMMANDS:
        _takes_flags = (training.train, launch.launch, recipe_bench.bench_recipe)
        # Megatron's own flags follow these after a --.
        _extra = {"ignore_unknown_options": _command in _takes_flags}
        app.command(context_settings=_extra)(_command)
