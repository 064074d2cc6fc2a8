"""Everything a run writes, in step with its journal.

WORK/dataset/    what becomes the output: .bin files, the list of rejected lines, at the end all
WORK/lengths/    document lengths of each domain
WORK/counts.N.npy, WORK/journal.json
"""

import hashlib
import re
import time
from collections.abc import Callable
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np

from megatron_infoentropy.data.blocks import Block, BrokenLineError, UnfitDocumentsError
from megatron_infoentropy.data.journal import Counts, DomainTally, InputTally, Journal, load_journal
from megatron_infoentropy.data.jsonl import BLANK
from megatron_infoentropy.data.manifest import REJECTED
from megatron_infoentropy.data.workers import DomainPart, Encoded
from megatron_infoentropy.data.writer import DatasetWriter, Size, write_all
from megatron_infoentropy.files import sync_folder
from megatron_infoentropy.progress import short

SAVE_EVERY_S = 30.0
SAVE_AFTER_INPUT_S = 1.0  # at the end of an input already after so much work
MOST_DOMAINS = 500  # each takes two open files
_LONGEST_NAME = 200  # bytes, of the 255 that file systems allow with what comes before and behind


class Run:
    """A run at the place that its journal tells; `add` moves it on, `save` makes that last.

    `job` is what must be the same for a run to go on; `max_errors` lines that hold no document are
    skipped, the next one ends the run.
    """

    def __init__(
        self,
        work: Path,
        *,
        job: dict[str, Any],
        vocab_size: int,
        max_errors: int,
    ) -> None:
        self.dataset = work / "dataset"
        self.journal = Journal()
        self.counts: dict[str, Counts] = {}
        self.writers: dict[str, DatasetWriter] = {}
        self._work, self._job = work, job
        self._vocab_size, self._max_errors = vocab_size, max_errors
        saved = load_journal(work, job)
        if saved is not None:
            self.journal, self.counts = saved
        self._rejects = self._open_as_journalled()
        self._saved_at = time.monotonic()

    def _open_as_journalled(self) -> FileIO:
        """Cut every file back to the journal's place; what it does not know goes."""
        for folder in (self.dataset, self._work / "lengths"):
            folder.mkdir(exist_ok=True)
        known = {f"{tally.prefix}.bin" for tally in self.journal.domains.values()} | {REJECTED}
        for path in self.dataset.iterdir():
            if path.name not in known:
                path.unlink()
        for name, tally in self.journal.domains.items():
            self.writers[name] = self._writer(tally)
        rejects = (self.dataset / REJECTED).open("ab", buffering=0)
        rejects.truncate(self.journal.rejected_bytes)
        return rejects

    def _writer(self, tally: DomainTally) -> DatasetWriter:
        return DatasetWriter(
            self.dataset / tally.prefix,
            vocab_size=self._vocab_size,
            lengths=self._work / "lengths" / tally.prefix,
            size=Size(tally.documents, tally.tokens),
        )

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
        if time.monotonic() - self._saved_at >= pause:
            self.save()

    def rates(self) -> Callable[[], str]:
        """Says how many documents there are, and how many tokens a second came since now."""
        start, before = time.monotonic(), self._tokens()

        def say() -> str:
            documents = sum(tally.documents for tally in self.journal.domains.values())
            rate = (self._tokens() - before) / max(time.monotonic() - start, 1e-9)
            return f"{short(documents)} documents, {short(rate)} tokens/s"

        return say

    def _tokens(self) -> int:
        return sum(tally.tokens for tally in self.journal.domains.values())

    def _add_lines(self, block: Block, encoded: Encoded) -> None:
        tally = self._tally()
        if tally.blank and encoded.trailing_blanks < block.lines:  # they were not at the end
            first = block.start.line - tally.blank
            for line in range(first, block.start.line):
                self._reject(block.path, line, BLANK, None)
            tally.blank = 0
        for rejected in encoded.rejected:
            line = block.start.line + rejected.line
            self._reject(block.path, line, rejected.reason, rejected.domain)
        for name, part in encoded.parts.items():
            self._write(name, part)
            tally.documents += part.lengths.size
            tally.empty += int((part.lengths == 0).sum())
        tally.blank += encoded.trailing_blanks
        self.journal.offset, self.journal.line = block.end.offset, block.end.line

    def _write(self, name: str, part: DomainPart) -> None:
        tally = self._domain(name)
        self.writers[name].add(part.tokens, part.lengths)
        np.add.at(self.counts[name], part.tokens, 1)
        tally.documents, tally.tokens = self.writers[name].size
        tally.empty += int((part.lengths == 0).sum())
        tally.bytes += part.bytes

    def _reject(self, path: Path, line: int, reason: str, domain: str | None) -> None:
        journal = self.journal
        if journal.rejected >= self._max_errors:
            skipped = f" ({self._max_errors} were skipped already)" if self._max_errors else ""
            raise BrokenLineError(path, line, reason + skipped)
        entry = f"{path.name}\t{line}\t{reason}\n".encode(errors="replace")
        write_all(self._rejects, entry)
        journal.rejected += 1
        journal.rejected_bytes += len(entry)
        self._tally().rejected += 1
        if domain is not None:
            self._domain(domain).rejected += 1

    def _tally(self) -> InputTally:
        """That of the input being read."""
        if len(self.journal.inputs) == self.journal.file:
            self.journal.inputs.append(InputTally())
        return self.journal.inputs[-1]

    def _domain(self, name: str) -> DomainTally:
        domains = self.journal.domains
        if name not in domains:
            prefix = slug(name)
            for other, tally in domains.items():
                if tally.prefix == prefix:
                    raise UnfitDocumentsError(
                        f"the domains {other!r} and {name!r} would both be written to "
                        f"{prefix}.bin; rename one"
                    )
            if len(domains) == MOST_DOMAINS:
                raise UnfitDocumentsError(
                    f"found more than {MOST_DOMAINS} domains, the last is {name!r}; is that what "
                    "the texts should be split by?"
                )
            domains[name] = DomainTally(prefix)
            self.counts[name] = np.zeros(self._vocab_size, dtype=np.int64)
            self.writers[name] = self._writer(domains[name])
        return domains[name]

    def _end_input(self, block: Block) -> None:
        tally, journal = self._tally(), self.journal
        lines = block.end.line - 1
        if lines != tally.documents + tally.rejected + tally.blank:
            raise RuntimeError(
                f"{block.path} has {lines} lines, but {tally.documents} documents, "
                f"{tally.rejected} rejected and {tally.blank} blank ones were counted; "
                "this is a mistake in this program, please report it"
            )
        tally.sha256 = block.sha256
        journal.lines.append(lines)
        journal.file, journal.offset, journal.line = journal.file + 1, 0, 1

    def save(self) -> None:
        """Have everything so far on the disk, and the journal say so."""
        for writer in self.writers.values():
            writer.sync()
        sync_folder(self.dataset)
        self.journal.save(self._work, self._job, self.counts)
        self._saved_at = time.monotonic()

    def close(self) -> None:
        """Close all files as they are."""
        self._rejects.close()
        for writer in self.writers.values():
            writer.close()


def slug(domain: str) -> str:
    """The domain's file name: lower case, everything but letters and digits to `_`.

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
