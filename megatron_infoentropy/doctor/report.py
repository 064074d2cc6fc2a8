"""The examination of a job's ranks for a reader: a row of the table for every rank, a line for
everything that was looked at or could not be, a sentence for every trouble."""

from dataclasses import dataclass
from pathlib import Path

from megatron_infoentropy.doctor.collectives import Measured
from megatron_infoentropy.doctor.facts import Facts

GIB, MIB = 2**30, 2**20
NAMED = 12  # digits of a checksum that a reader compares


@dataclass(frozen=True)
class Report:
    """What was found. `memory` (bytes of a rank) is None where no recipe was counted, `tokenizer`
    where none was to be looked at."""

    facts: list[Facts]
    measured: list[Measured]
    memory: int | None
    tokenizer: Path | None
    run: Path
    disk: int  # bytes wanted there
    troubles: list[str]

    def lines(self) -> list[str]:
        """One fact a line."""
        found = f"{len(self.troubles)} trouble{'s' if len(self.troubles) > 1 else ''}"
        looked_at = self._looked_at()
        width = max(len(what) for what, _ in looked_at) + 2
        return [
            *_table(self.facts),
            "",
            *(f"{what:{width}}{said}" for what, said in looked_at),
            "",
            *(f"!!  {trouble}" for trouble in self.troubles),
            f"{found}: mend before the training" if self.troubles else self._well(),
        ]

    def _well(self) -> str:
        count = len(self.facts)
        return f"ok  {count} ranks can work together" if count > 1 else "ok  this rank can train"

    def _looked_at(self) -> list[tuple[str, str]]:
        first = self.facts[0]
        free, room = (min(getattr(one, what) for one in self.facts) for what in ("memory", "disk"))
        memory = "not counted: no RECIPE that can be trained"
        if self.memory is not None:
            memory = f"a rank takes {_size(self.memory)} by the recipe, {_size(free)} are free"
        return [
            ("versions", ", ".join(f"{n} {found}" for n, found in first.versions.items())),
            ("memory", memory),
            ("disk", f"{_size(self.disk)} are wanted for {self.run}, {_size(room)} are free"),
            ("data", self._data()),
            ("tokenizer", self._tokenizer()),
            *((one.transfer.name, _transfer(one)) for one in self.measured),
        ]

    def _data(self) -> str:
        found = [one.data for one in self.facts if one.data is not None]
        if not found:
            return "not looked at: name --data"
        unread = sum(not one.opened for one in found)
        if unread:
            return f"{unread} of {len(found)} ranks could open none of its files"
        compared = sum(one.compared for one in found)
        size = sum(one.compared_bytes for one in found) / 1e6
        opened = f"{min(one.opened for one in found)} files, opened by every rank"
        if not compared:
            return f"{opened}; no checksums: their manifests have none, an old version wrote them"
        return f"{opened}; {compared} checksums compared, {size:.1f} MB"

    def _tokenizer(self) -> str:
        if self.tokenizer is None:
            return "not looked at: name --tokenizer"
        unread = sum(not one.tokenizer for one in self.facts)
        if unread:
            return f"{unread} of {len(self.facts)} ranks could not read it"
        first = self.facts[0]
        named = f"SHA-256 {first.tokenizer[:NAMED]}..."
        if first.data is None or not first.data.tokenizer:
            return f"{named}, no data to compare it with"
        same = first.data.tokenizer == first.tokenizer
        return f"{named}, {'that of the data' if same else 'not that of the data'}"


def _table(facts: list[Facts]) -> list[str]:
    rows = [("rank", "host", "device", "memory free", "disk free", "clock")]
    for one in facts:
        sizes = _size(one.memory), _size(one.disk)
        rows.append((str(one.rank), one.host, one.device, *sizes, f"{1e3 * one.clock_s:+.1f} ms"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(map(str.rjust, row, widths)) for row in rows]


def _transfer(one: Measured) -> str:
    transfer = one.transfer
    return (
        f"{transfer.kind} of {transfer.bytes / MIB:.3g} MiB over {transfer.ranks} ranks: "
        f"{1e3 * one.seconds:.1f} ms, {one.gbps:.2f} GB/s, "
        f"results {'WRONG' if one.wrong_ranks else 'right'}"
    )


def _size(size: int) -> str:
    return f"{size / GIB:.1f} GiB" if size >= GIB else f"{size / MIB:.1f} MiB"
