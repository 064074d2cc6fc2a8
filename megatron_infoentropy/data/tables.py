"""Rows of Parquet files, and of the Arrow files that `datasets` saves, in place of lines of JSON.

A block is an Arrow stream of one batch with two columns of bytes, the texts and the domains: the
reading process cuts the file into such, without making anything of Python's of a row. A row's
number stands for that of a line, so a run goes on at a row, in the group or batch that has it.

Only the two columns are read. Nothing is believed of a file: what says where a text begins and
ends is checked before anything follows it. A dictionary, of which a few bytes a row can stand for
one long text each time, stays one until its rows are few enough for a block; where pyarrow decodes
it by itself, the rows of one reading are at most `_MOST_ROWS`.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from megatron_infoentropy.data import blocks
from megatron_infoentropy.data.blocks import Block, BrokenLineError, Keys, Position
from megatron_infoentropy.files import file_sha256
from megatron_infoentropy.progress import Advance

try:
    import pyarrow as pa
    from pyarrow import compute
    from pyarrow import parquet as pq
except ModuleNotFoundError as missing:
    raise RuntimeError(
        "reading Parquet and Arrow files needs the package pyarrow, which is not installed: "
        "pip install 'megatron-infoentropy[parquet]'"
    ) from missing

_MOST_ROWS = 1 << 10  # of a block, as rows without any text have a size too
_FILE_MAGIC = b"ARROW1"  # else it is a stream, as `datasets` writes
_END_OF_STREAM = b"\xff\xff\xff\xff\0\0\0\0"
_STRINGS = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)

Part = tuple[Any, float]  # rows, and how much of the file is read with them


def read_tables(path: Path, advance: Advance, start: Position, keys: Keys) -> Iterator[Block]:
    """Yield the rows of one file from `start` on, and last a block without any: the end.

    Raises:
        BrokenLineError: the file is damaged, or has no text in that column.
    """
    sha256, size = file_sha256(path), path.stat().st_size
    at, told = start, 0
    try:
        with path.open("rb") as file:
            parts = _parquet if path.suffix == ".parquet" else _arrow
            for rows, read in parts(file, start.line - 1, keys):
                advance(int(size * read) - told)
                told = int(size * read)
                for some in _cut(_two_columns(rows, keys)):
                    end = Position(0, at.line + some.num_rows)
                    yield Block(path, _packed(some), at, end, is_table=True)
                    at = end
    except (pa.ArrowException, OSError, UnicodeDecodeError, MemoryError) as error:  # for damage
        what = "Parquet" if path.suffix == ".parquet" else "Arrow"
        reason = f"no {what} file, or a damaged or truncated one: {error}"
        raise BrokenLineError(path, at.line, reason) from error
    except _ColumnError as error:
        raise BrokenLineError(path, at.line, str(error)) from error
    advance(size - told)
    yield Block(path, b"", at, at, sha256, is_table=True)


def rows_of(data: bytes) -> list[tuple[bytes | None, bytes | None]]:
    """Return the rows of a block, each its text and its domain."""
    with pa.ipc.open_stream(data) as stream:
        texts, domains = stream.read_next_batch().columns
    return list(zip(texts.to_pylist(), domains.to_pylist(), strict=True))


class _ColumnError(ValueError):
    """Why a file's columns hold no texts."""


def _parquet(file: BinaryIO, skip: int, keys: Keys) -> Iterator[Part]:
    """Yield rows, group after group, from row `skip` on."""
    parquet = pq.ParquetFile(file, pre_buffer=False, buffer_size=1 << 20)
    _require_text(parquet.schema_arrow, keys)
    facts, before = parquet.metadata, 0
    for group in range(facts.num_row_groups):
        rows = facts.row_group(group).num_rows
        if skip < rows:
            fitting = blocks.BLOCK_BYTES * rows // max(facts.row_group(group).total_byte_size, 1)
            at_once, done = max(1, min(fitting, _MOST_ROWS)), before
            columns = [key for key in (keys.text, keys.domain) if key]
            for batch in parquet.iter_batches(at_once, [group], columns, use_threads=False):
                done += batch.num_rows
                if skip < batch.num_rows:
                    yield batch.slice(skip), done / facts.num_rows
                skip = max(skip - batch.num_rows, 0)
        else:
            skip -= rows
        before += rows


def _arrow(file: BinaryIO, skip: int, keys: Keys) -> Iterator[Part]:
    """Yield rows, batch after batch, from row `skip` on."""
    size = file.seek(0, 2)
    file.seek(max(size - len(_END_OF_STREAM), 0))
    is_ended = file.read() == _END_OF_STREAM
    file.seek(0)
    is_file = file.read(len(_FILE_MAGIC)) == _FILE_MAGIC
    file.seek(0)
    if not is_file and not is_ended:
        raise pa.ArrowInvalid("it does not end as a stream does")
    reader = pa.ipc.open_file(file) if is_file else pa.ipc.open_stream(file)
    _require_text(reader.schema, keys)
    numbers = range(reader.num_record_batches) if is_file else ()
    for batch in map(reader.get_batch, numbers) if is_file else reader:
        batch.validate()
        if skip < batch.num_rows:
            yield batch.slice(skip), file.tell() / size
        skip = max(skip - batch.num_rows, 0)


def _require_text(schema: Any, keys: Keys) -> None:
    if keys.text not in schema.names:
        raise _ColumnError(
            f'no "{keys.text}" column; the columns are {schema.names}; name another with '
            "--text-column"
        )
    kind = schema.field(keys.text).type
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    if not any(is_string(kind) for is_string in _STRINGS):
        raise _ColumnError(
            f'the column "{keys.text}" must hold strings, but is of type {kind}; name another with '
            "--text-column"
        )


def _two_columns(batch: Any, keys: Keys) -> Any:
    """Return the texts and domains of some rows, in bytes."""
    columns = [_as_bytes(batch.column(keys.text)), _as_bytes(_domains(batch, keys.domain))]
    return pa.record_batch(columns, names=["text", "domain"])


def _cut(rows: Any) -> Iterator[Any]:
    """Yield the rows in pieces that fit into a block; a row is not cut."""
    size = sum(map(_size, rows.columns))
    if rows.num_rows == 1 or (rows.num_rows <= _MOST_ROWS and size <= blocks.BLOCK_BYTES):
        yield rows
        return
    half = rows.num_rows // 2
    yield from _cut(rows.slice(0, half))
    yield from _cut(rows.slice(half))


def _size(column: Any) -> int:
    """Return how many bytes a column has once a dictionary's texts are written out."""
    if pa.types.is_dictionary(column.type):
        lengths = compute.binary_length(column.dictionary).take(column.indices)
    else:
        lengths = compute.binary_length(column)
    return compute.sum(lengths).as_py() or 0


def _packed(rows: Any) -> bytes:
    """Return texts and domains as an Arrow stream."""
    columns = [
        column.dictionary_decode() if pa.types.is_dictionary(column.type) else column
        for column in rows.columns
    ]
    packed = pa.record_batch(columns, names=rows.schema.names)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, packed.schema) as stream:
        stream.write_batch(packed)
    return bytes(sink.getvalue().to_pybytes())


def _domains(batch: Any, key: str | None) -> Any:
    """Return the column of that name, or where dots lead to; nulls where there is none."""
    names = batch.schema.names
    first, *rest = [key] if key in names else (key or "").split(".")
    column = batch.column(first) if first in names else pa.nulls(batch.num_rows)
    for name in rest:
        if not pa.types.is_struct(column.type) or column.type.get_field_index(name) < 0:
            return pa.nulls(batch.num_rows)
        column = compute.struct_field(column, name)
    return column


def _as_bytes(column: Any) -> Any:
    """Return a column's strings as bytes, checked; nulls where it has no strings."""
    if pa.types.is_dictionary(column.type):
        return pa.DictionaryArray.from_arrays(column.indices, _as_bytes(column.dictionary))
    if any(is_string(column.type) for is_string in _STRINGS):
        column = column.cast(pa.large_binary())
    if not pa.types.is_large_binary(column.type):
        return pa.nulls(len(column), pa.large_binary())
    column.validate(full=True)
    return column
