"""Starts the ranks of an examination on this machine, as `infoentropy doctor --ranks N` does."""

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence

from megatron_infoentropy.doctor.data_files import READING


def start_ranks(words: Sequence[str], ranks: int, say: Callable[[str], object]) -> tuple[str, int]:
    """Run `infoentropy doctor WORDS` on so many ranks; `say` gets a line of progress at times.

    Returns:
        What rank 0 wrote, and 1 where there are troubles, else 0.

    Raises:
        RuntimeError: the ranks failed, with what they said.
    """
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
        *("--nproc-per-node", str(ranks)),
        *("-m", "--", "megatron_infoentropy", "doctor", *words),
    ]
    with (
        tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as output,
        subprocess.Popen(
            command,
            stdout=output,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            env={"OMP_NUM_THREADS": "1", **os.environ},
        ) as process,
    ):
        assert process.stderr is not None
        errors = []
        for line in process.stderr:
            errors.append(line)
            if line.startswith(READING):
                say(line)
        code = process.wait()
        output.seek(0)
        told = output.read()
    if code and not told:
        raise RuntimeError(last_words("".join(errors)))
    return told, min(code, 1)


def last_words(errors: str) -> str:
    """What the ranks said: a sentence of ours, or the exception of the first traceback."""
    ours = re.search(r"^infoentropy: (?P<what>.*)$", errors, re.MULTILINE)
    raised = re.search(  # torch puts "[rank1]: " before a rank's lines, others' may lie between
        r"^(\[rank\d+\]: |)Traceback .*\n(?:(?!\1\S).*\n)+\1(?P<what>\S.*)$", errors, re.MULTILINE
    )
    found = ours or raised
    return found["what"] if found else f"the ranks failed:\n{errors[-2000:]}"
