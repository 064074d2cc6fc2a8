"""A command in the test's own process: importing transformers takes longer than most of them."""

import contextlib
from pathlib import Path

from typer.testing import CliRunner

from megatron_infoentropy.cli import app


def infoentropy(*words: object, cwd: Path) -> str:
    """What `infoentropy WORDS`, given in this folder, prints; fails with it and the error."""
    with contextlib.chdir(cwd):
        done = CliRunner().invoke(app, [*map(str, words)])
    assert done.exit_code == 0, f"{done.output}{done.exception!r}"
    return done.output
