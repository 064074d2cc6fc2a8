"""How far a run is, written so that a run that is killed can go on.

The journal names a place in the inputs and the sizes that all files had there. Files are synced
before it is, and it is replaced by a rename, so at any moment the last journal describes data that
is on the disk; whatever came after it is cut off. Nothing else has to be right for resuming.
"""

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_infoentropy.data.blocks import Position
from megatron_infoentropy.files import write_whole

JOURNAL = "journal.json"
Counts = npt.NDArray[np.int64]  # [vocab_size]


@dataclass
class InputTally:
    """What the lines of one input were, so far; `blank` ones are blank up to its end.

    `sha256` is that of the whole file, once it is read.
    """

    documents: int = 0
    empty: int = 0
    rejected: int = 0
    blank: int = 0
    sha256: str = ""


@dataclass
class DomainTally:
    """What one domain has, so far."""

    prefix: str
    documents: int = 0
    empty: int = 0
    tokens: int = 0
    bytes: int = 0
    rejected: int = 0


@dataclass
class Journal:
    """The state of a run at a place: input number `file`, and where in it."""

    file: int = 0
    offset: int = 0
    line: int = 1
    lines: list[int] = field(default_factory=list)  # of each finished input
    inputs: list[InputTally] = field(default_factory=list)
    domains: dict[str, DomainTally] = field(default_factory=dict)
    rejected_bytes: int = 0  # size of the list of rejected lines
    rejected: int = 0
    saves: int = 0  # names the file of counts that belongs to this journal

    @property
    def position(self) -> Position:
        """Where in the input reading goes on."""
        return Position(self.offset, self.line)

    def save(self, folder: Path, job: dict[str, Any], counts: dict[str, Counts]) -> None:
        """Make this the state to go on from; `counts` by domain, in the journal's order."""
        old = folder / _counts_name(self.saves)
        self.saves += 1
        path = folder / _counts_name(self.saves)
        with path.open("wb") as file:
            np.save(file, np.array([counts[name] for name in self.domains], dtype=np.int64))
            file.flush()
            os.fsync(file.fileno())
        content = {"job": job, "state": asdict(self)}
        write_whole(folder / JOURNAL, json.dumps(content).encode())
        old.unlink(missing_ok=True)


def load_journal(folder: Path, job: dict[str, Any]) -> tuple[Journal, dict[str, Counts]] | None:
    """The state of an earlier run of the same job, or None where there is none.

    Raises:
        ValueError: it is the state of another job.
    """
    path = folder / JOURNAL
    if not path.is_file():
        return None
    content = json.loads(path.read_text(encoding="utf-8"))
    for key, wanted in job.items():
        if content["job"].get(key) != wanted:
            raise ValueError(
                f"{folder} holds an unfinished run with other {key}; give its command again to "
                "finish it, or restart (--restart) to throw it away"
            )
    state = content["state"]
    journal = Journal(**state)
    journal.inputs = [InputTally(**tally) for tally in state["inputs"]]
    journal.domains = {name: DomainTally(**tally) for name, tally in state["domains"].items()}
    table = np.load(folder / _counts_name(journal.saves))
    return journal, dict(zip(journal.domains, table, strict=True))


def _counts_name(number: int) -> str:
    return f"counts.{number}.npy"
