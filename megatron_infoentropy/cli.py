"""The `infoentropy` command. Each command imports its room inside itself: all start fast."""

import os
import sys
from io import TextIOWrapper
from typing import Annotated

import typer

from megatron_infoentropy import __version__
from megatron_infoentropy.commands import data, evaluation, machine, training
from megatron_infoentropy.console import make_console
from megatron_infoentropy.runtime.device import use_huge_pages

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
    _require_utf8()
    use_huge_pages()
    try:
        app()
    except (ValueError, RuntimeError, OSError) as error:
        make_console(stderr=True).print(f"infoentropy: {error}")
        sys.exit(1)


def _require_utf8() -> None:
    """Take names of files and all text for UTF-8, here and in child processes, in any locale.

    Python decides at its start how names of files are encoded, so it is started again.
    """
    if sys.getfilesystemencoding() != "utf-8":
        os.environ["PYTHONUTF8"] = "1"
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
    if isinstance(sys.stdout, TextIOWrapper):  # PYTHONIOENCODING, or a name that is not UTF-8
        sys.stdout.reconfigure(errors="backslashreplace")


@app.callback(invoke_without_command=True)
def about(
    show_version: Annotated[bool, typer.Option("--version", help="print the version")] = False,
) -> None:
    if show_version:
        make_console().print(__version__)
        raise typer.Exit


_TAKE_FLAGS = (training.train, training.launch, machine.bench_recipe)  # Megatron's, after a --
_COMMANDS = (  # in the order of the work, as --help lists them
    *(data.corpus, data.tokenizer, data.preprocess, data.merge, data.pack, data.blend),
    *(data.inspect, data.verify),
    *(training.train, training.launch),
    *(training.convert, training.convert_from_hf),
    *(evaluation.evaluate, evaluation.compare, evaluation.report),
    *(evaluation.tasks, evaluation.study),
    *(machine.doctor, machine.bench, machine.bench_recipe),
)
for _command in _COMMANDS:
    app.command(context_settings={"ignore_unknown_options": _command in _TAKE_FLAGS})(_command)
