"""What an evaluation has done so far, in a folder beside its result, so that it can go on.

    FOLDER/evaluation.unfinished/plan.json      what is scored, with what, and how
    FOLDER/evaluation.unfinished/000017.npz     the scores of one chunk, whole or not there

An evaluation of the same plan takes what is there; one of another plan is refused. The folder goes
when the result has been written.
"""

import json
import shutil
import zipfile
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np

from megatron_infoentropy.evaluate.chunks import ChunkScores
from megatron_infoentropy.evaluate.errors import UnfinishedEvaluationError
from megatron_infoentropy.evaluate.evaluation import UNFINISHED
from megatron_infoentropy.evaluate.tally import Tally
from megatron_infoentropy.files import write_atomically

_ARRAYS = tuple(field.name for field in fields(ChunkScores) if field.name != "tally")
_PLAN = "plan.json"
_TALLY = ("by_entropy", "by_confidence")


class Journal:
    """Chunks that are done, below the folder of an evaluation's result.

    Args:
        folder: where the result will be written; several ranks share it.
        vocab_size: of the tally.
    """

    def __init__(self, folder: Path, vocab_size: int) -> None:
        self.folder = folder / UNFINISHED
        self._vocab_size = vocab_size

    def start(self, plan: dict[str, Any], *, restart: bool) -> int:
        """Begin, or go on with what is there; one rank does it for all.

        Returns:
            How many chunks are done already.

        Raises:
            UnfinishedEvaluationError: something else was interrupted here.
        """
        path = self.folder / _PLAN
        if restart:
            shutil.rmtree(self.folder, ignore_errors=True)
        if path.is_file():
            found = self.plan()
            different = [name for name in plan if found.get(name) != plan[name]]
            if different:
                raise UnfinishedEvaluationError(
                    f"{self.folder} holds an interrupted evaluation with another "
                    f"{' and '.join(different)}: name another --output, or --restart to discard it"
                )
        else:
            with write_atomically(path) as temporary:
                temporary.write_text(json.dumps(plan, indent=2) + "\n", encoding="utf-8")
        return len(list(self.folder.glob("[0-9]*.npz")))

    def plan(self) -> dict[str, Any]:
        """What was given to `start`."""
        found: dict[str, Any] = json.loads((self.folder / _PLAN).read_text(encoding="utf-8"))
        return found

    def has(self, chunk: int) -> bool:
        return self._path(chunk).is_file()

    def write(self, chunk: int, done: ChunkScores) -> None:
        arrays = {name: getattr(done, name) for name in _ARRAYS}
        arrays |= {name: getattr(done.tally, name) for name in _TALLY}
        with write_atomically(self._path(chunk)) as temporary, temporary.open("wb") as file:
            np.savez(file, **arrays)

    def read(self, chunk: int) -> ChunkScores:
        """Raises UnfinishedEvaluationError where the chunk is missing or damaged."""
        try:
            with np.load(self._path(chunk), allow_pickle=False) as arrays:
                tally = Tally(self._vocab_size)
                for name in _TALLY:
                    getattr(tally, name)[:] = arrays[name]
                return ChunkScores(**{name: arrays[name] for name in _ARRAYS}, tally=tally)
        except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
            self._path(chunk).unlink(missing_ok=True)
            raise UnfinishedEvaluationError(
                f"part {chunk} of the evaluation in {self.folder} cannot be read ({error}) and was "
                "removed: repeat the command, which scores it again; several ranks need one folder"
            ) from error

    def finish(self) -> None:
        """Remove it: the result has been written."""
        shutil.rmtree(self.folder)

    def _path(self, chunk: int) -> Path:
        return self.folder / f"{chunk:06d}.npz"
