"""Everything a run of `preprocess` writes, in step with a journal, so that a killed run can go on.

    WORK/dataset/   what becomes the output: .bin files, the list of rejected lines, at the end all
    WORK/lengths/   document lengths of each domain
    WORK/journal    a place in the inputs and the sizes of all files there, a line of JSON; behind
                    it the token counts by domain, as np.save writes them

The files are synced before the journal is, and it is replaced by a rename, so at any moment the
last journal describes data that is on the disk; whatever came after it is cut off. Nothing else has
to be right for resuming.
"""

import hashlib
import json
import re
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np

from megatron_infoentropy.data.blocks import (
    Block,
    BrokenLineError,
    Position,
    UnfitDocumentsError,
)
from megatron_infoentropy.data.jsonl import BLANK
from megatron_infoentropy.data.manifest import REJECTED, DomainFacts, InputFacts
from megatron_infoentropy.data.workers import Encoded
from megatron_infoentropy.data.writer import Counts, DatasetWriter, save_array, write_all
from megatron_infoentropy.files import sync_folder, write_atomically

JOURNAL = "journal"
SAVE_EVERY_S = 30.0
SAVE_AFTER_INPUT_S = 1.0  # at the end of an input already after so much work
MOST_DOMAINS = 500  # each takes two open files
_LONGEST_NAME = 200  # bytes, of the 255 that file systems allow with what comes before and behind


@dataclass
class RunState:
    """The place of a run: in input number `file`, at a place between two of its lines."""

    inputs: list[InputFacts]
    domains: dict[str, DomainFacts] = field(default_factory=dict)
    file: int = 0
    offset: int = 0
    line: int = 1
    rejected_bytes: int = 0  # size of the list of rejected lines


class JournalledRun:
    """A run at the place that its journal tells; `add` moves it on, `save` makes that last.

    `job` is what must be the same for a run to go on, plain JSON; `inputs` say what is known of the
    files before any is read. `max_errors` lines that hold no document are skipped, the next one
    ends the run. Without `is_saved` there is no journal: what the inputs are is gone with the run.

    Raises:
        ValueError: there is a journal of another job.
    """

    def __init__(
        self,
        work: Path,
        *,
        job: dict[str, Any],
        inputs: Sequence[InputFacts],
        vocab_size: int,
        max_errors: int,
        is_saved: bool = True,
    ) -> None:
        self.dataset = work / "dataset"
        self.writers: dict[str, DatasetWriter] = {}
        self._work, self._job = work, job
        self._vocab_size, self._max_errors = vocab_size, max_errors
        saved = load_journal(work, job)
        self.state, counts = saved or (RunState(list(inputs)), {})
        self._rejects = self._open_as_journalled(counts)
        self._is_saved, self._saved_at = is_saved, time.monotonic()

    def _open_as_journalled(self, counts: dict[str, Counts]) -> FileIO:
        """Cut every file back to the journal's place; what it does not know goes."""
        for folder in (self.dataset, self._work / "lengths"):
            folder.mkdir(exist_ok=True)
        known = {f"{facts.prefix}.bin" for facts in self.state.domains.values()} | {REJECTED}
        for path in self.dataset.iterdir():
            if path.name not in known:
                path.unlink()
        for name, facts in self.state.domains.items():
            self.writers[name] = self._writer(facts, counts[name])
        rejects = (self.dataset / REJECTED).open("ab", buffering=0)
        rejects.truncate(self.state.rejected_bytes)
        return rejects

    def _writer(self, facts: DomainFacts, counts: Counts | None = None) -> DatasetWriter:
        return DatasetWriter(
            self.dataset / facts.prefix,
            vocab_size=self._vocab_size,
            lengths=self._work / "lengths" / facts.prefix,
            facts=facts,
            counts=counts,
        )

    @property
    def position(self) -> Position:
        """Return the place in the input at which reading goes on."""
        return Position(self.state.offset, self.state.line)

    @property
    def rejected(self) -> int:
        """Count the lines that were skipped."""
        return sum(facts.rejected for facts in self.state.inputs)

    def add(self, block: Block, encoded: Encoded) -> None:
        """Take in the next block; an empty one ends its input.

        Raises:
            BrokenLineError: a line that holds no document, and no more may be skipped.
        """
        if block.lines:
            self._add_lines(block, encoded)
        else:
            self._end_input(block)
        pause = SAVE_EVERY_S if block.lines else SAVE_AFTER_INPUT_S
        if self._is_saved and time.monotonic() - self._saved_at >= pause:
            self.save()

    def _add_lines(self, block: Block, encoded: Encoded) -> None:
        facts = self.state.inputs[self.state.file]
        if facts.blank and encoded.trailing_blanks < block.lines:  # they were not at the end
            for line in range(block.start.line - facts.blank, block.start.line):
                self._reject(block.path, line, BLANK, None)
            facts.blank = 0
        for rejected in encoded.rejected:
            line = block.start.line + rejected.line
            self._reject(block.path, line, rejected.reason, rejected.domain)
        for name, part in encoded.parts.items():
            self._domain(name).add(part.tokens, part.lengths)
            self._domain(name).facts.bytes += part.bytes
            facts.documents += part.lengths.size
            facts.empty += int((part.lengths == 0).sum())
        facts.blank += encoded.trailing_blanks
        self.state.offset, self.state.line = block.end.offset, block.end.line

    def _reject(self, path: Path, line: int, reason: str, domain: str | None) -> None:
        if self.rejected >= self._max_errors:
            skipped = f" ({self._max_errors} were skipped already)" if self._max_errors else ""
            raise BrokenLineError(path, line, reason + skipped)
        entry = f"{path.name}\t{line}\t{reason}\n".encode(errors="replace")
        write_all(self._rejects, entry)
        self.state.rejected_bytes += len(entry)
        self.state.inputs[self.state.file].rejected += 1
        if domain is not None:
            self._domain(domain).facts.rejected += 1

    def _domain(self, name: str) -> DatasetWriter:
        if name not in self.writers:
            prefix = slug(name)
            for other, facts in self.state.domains.items():
                if facts.prefix == prefix:
                    raise UnfitDocumentsError(
                        f"the domains {other!r} and {name!r} would both be written to "
                        f"{prefix}.bin; rename one"
                    )
            if len(self.writers) == MOST_DOMAINS:
                raise UnfitDocumentsError(
                    f"found more than {MOST_DOMAINS} domains, the last is {name!r}; is that what "
                    "the texts should be split by?"
                )
            self.state.domains[name] = DomainFacts(prefix, 0, 0, 0)
            self.writers[name] = self._writer(self.state.domains[name])
        return self.writers[name]

    def _end_input(self, block: Block) -> None:
        facts = self.state.inputs[self.state.file]
        facts.lines = block.end.line - 1
        if facts.lines != facts.documents + facts.rejected + facts.blank:
            raise RuntimeError(
                f"{block.path} has {facts.lines} lines, but {facts.documents} documents, "
                f"{facts.rejected} rejected and {facts.blank} blank ones were counted; "
                "this is a mistake in this program, please report it"
            )
        for writer in self.writers.values():
            writer.end_span()
        facts.sha256 = block.sha256
        facts.bytes = facts.bytes or block.end.offset  # of standard input it is only known now
        self.state.file, self.state.offset, self.state.line = self.state.file + 1, 0, 1

    def save(self) -> None:
        """Have everything so far on the disk, and the journal say so."""
        for writer in self.writers.values():
            writer.sync()
        sync_folder(self.dataset)
        content = json.dumps({"job": self._job, "state": asdict(self.state)})
        counts = np.array([writer.counts for writer in self.writers.values()], dtype=np.int64)
        with write_atomically(self._work / JOURNAL) as path, path.open("wb") as file:
            file.write(f"{content}\n".encode())
            save_array(file, counts)
        self._saved_at = time.monotonic()

    def close(self) -> None:
        """Close all files as they are."""
        self._rejects.close()
        for writer in self.writers.values():
            writer.close()


def load_journal(work: Path, job: dict[str, Any]) -> tuple[RunState, dict[str, Counts]] | None:
    """Read the state of an earlier run of the same job; None where there is none.

    Raises:
        ValueError: it is the state of another job.
    """
    if not (work / JOURNAL).is_file():
        return None
    with (work / JOURNAL).open("rb") as file:
        content, table = json.loads(file.readline()), np.load(file)
    for key, wanted in job.items():
        if content["job"].get(key) != wanted:
            raise ValueError(
                f"{work} holds an unfinished run with other {key}; give its command again to "
                "finish it, or restart (--restart) to throw it away"
            )
    state = RunState(**content["state"])
    state.inputs = [InputFacts(**facts) for facts in content["state"]["inputs"]]
    state.domains = {
        name: DomainFacts(**facts) for name, facts in content["state"]["domains"].items()
    }
    return state, dict(zip(state.domains, table, strict=True))


def slug(domain: str) -> str:
    """Return the domain's file name: lower case, everything but letters and digits to `_`.

    A name that is too long for a file system is cut, with a checksum of all of it behind.

    Raises:
        UnfitDocumentsError: nothing but underscores would be left.
    """
    name = re.sub(r"\W", "_", domain.lower())
    if not name.strip("_"):
        raise UnfitDocumentsError(
            f"the domain {domain!r} has no letter or digit to name a file after"
        )
    raw = name.encode()
    if len(raw) <= _LONGEST_NAME:
        return name
    checksum = hashlib.sha256(raw).hexdigest()[:16]
    return f"{raw[:_LONGEST_NAME].decode(errors='ignore')}_{checksum}"
