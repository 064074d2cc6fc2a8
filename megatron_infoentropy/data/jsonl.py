"""Documents from files of lines, one JSON object each, or from the rows of a table.

    {"text": "...", "meta": {"pile_set_name": "Pile-CC"}}

A line that is not such an object is an error that names file, line and reason. Blank lines at the
end of a file are harmless and ignored; a blank line before another document is an error, because
that is where a document was lost.
"""

import json
import re
from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

from megatron_infoentropy.data.blocks import TEXT_ALONE, BrokenLineError, Keys, read_blocks

WHOLE = "all"  # the domain of texts that are not split
BLANK = "blank line before the end of the file"
_HALF_SURROGATE = re.compile("[\ud800-\udfff]")  # JSON can spell it, no file can hold it


class Record(NamedTuple):
    """One document of a file."""

    text: str
    text_bytes: int  # in UTF-8
    domain: str | None  # None where no domain was asked for


class BrokenRecordError(ValueError):
    """Why a line or row holds no document, and of which domain, as far as that can be told."""

    def __init__(self, reason: str, domain: str | None = None) -> None:
        super().__init__(reason)
        self.domain = domain


Row = tuple[bytes | None, bytes | None]  # a text and a domain


def read_documents(
    path: Path, keys: Keys = TEXT_ALONE, advance: Callable[[int], None] = lambda _: None
) -> Iterator[Record]:
    """Yield the documents of one file in order.

    `advance` is called with the number of bytes read from the file since the last call, for a
    progress bar.

    Raises:
        BrokenLineError: the first line that is not a document.
        ValueError: see `blocks.require_readable`.
    """
    blank = None
    for block in read_blocks(path, advance, keys=keys):
        for line, raw in enumerate(rows_of(block.data, block.is_table), block.start.line):
            if is_blank(raw):
                blank = blank or line
                continue
            if blank is not None:
                raise BrokenLineError(path, blank, BLANK)
            try:
                record = parse(raw, keys)
            except BrokenRecordError as error:
                raise BrokenLineError(path, line, str(error)) from error
            yield record


def rows_of(data: bytes, is_table: bool) -> Sequence[bytes | Row]:
    """Return the rows of a table's block, else the lines of one.

    Only newlines separate lines, as JSON may hold U+2028 and the like.
    """
    if is_table and data:
        rows: list[Row] = import_module("megatron_infoentropy.data.tables").rows_of(data)
        return rows
    lines = data.split(b"\n")
    return lines if lines[-1] else lines[:-1]


def is_blank(raw: bytes | Row) -> bool:
    """Say whether a line holds nothing but white space."""
    return isinstance(raw, bytes) and (not raw or raw.isspace())


def parse(raw: bytes | Row, keys: Keys) -> Record:
    """Return the document of a line or row.

    Raises:
        BrokenRecordError: it holds none.
    """
    text, domain = _of_line(raw, keys) if isinstance(raw, bytes) else _of_row(raw, keys)
    if not isinstance(text, str):
        kind = type(text).__name__
        raise BrokenRecordError(f'"{keys.text}" must be a string, got {kind}', domain)
    if domain is None and keys.domain is not None and keys.is_domain_required:
        raise BrokenRecordError(
            f"no domain: expected a non-empty string at {keys.domain}; choose another key with "
            "--split-by, or --split-by '' for one dataset of all documents"
        )
    try:
        text_bytes = len(text.encode())
    except UnicodeEncodeError as error:  # JSON can spell half of a surrogate pair: "\ud800"
        at = f'"{keys.text}" holds half a surrogate pair at {error.start}'
        raise BrokenRecordError(at, domain) from error
    return Record(text, text_bytes, domain)


def _of_line(raw: bytes, keys: Keys) -> tuple[object, str | None]:
    record = _decode(raw)
    if not isinstance(record, dict):
        raise BrokenRecordError(f"expected a JSON object, got {type(record).__name__}")
    domain = None if keys.domain is None else _domain(record, keys.domain)
    if keys.text not in record:
        raise BrokenRecordError(
            f'no "{keys.text}" key; the keys are {sorted(record)}; name another with --text-key',
            domain,
        )
    return record[keys.text], domain


def _of_row(row: Row, keys: Keys) -> tuple[str | None, str | None]:
    text, name = row
    domain = (name or b"").decode(errors="replace") or None
    try:
        return None if text is None else text.decode(), domain
    except UnicodeDecodeError as error:
        reason = f'not UTF-8 at byte {error.start} of "{keys.text}"'
        raise BrokenRecordError(reason, domain) from error


def _decode(raw: bytes) -> Any:
    try:
        return json.loads(raw.decode("utf-8-sig"))  # some Windows programs begin files with a mark
    except UnicodeDecodeError as error:
        raise BrokenRecordError(
            f"not UTF-8 at byte {error.start} of the line; convert the file to UTF-8, or give it "
            "the name of what it is (.jsonl.zst, .jsonl.gz)"
        ) from error
    except json.JSONDecodeError as error:
        raise BrokenRecordError(f"not JSON: {error.msg} at column {error.colno}") from error
    except RecursionError as error:
        raise BrokenRecordError("not readable: JSON nested too deeply") from error
    except ValueError as error:  # a number of thousands of digits
        raise BrokenRecordError(f"not readable: {error}") from error


def _domain(record: dict[str, Any], domain_key: str) -> str | None:
    """Return what stands at a key of that name, as with a table's column, or where dots lead."""
    value: Any = record
    for key in [domain_key] if domain_key in record else domain_key.split("."):
        value = value.get(key) if isinstance(value, dict) else None
    if not isinstance(value, str) or _HALF_SURROGATE.search(value):
        return None
    return value or None
