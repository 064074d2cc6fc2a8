"""Parquet, folders of `datasets`, stores, standard input: they give the bytes of .jsonl files."""

import json
import pickle
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import fsspec
import pytest
from encoder_here import interrupted, when_reading
from fsspec.implementations import memory
from text_files import command, line, write

from megatron_infoentropy.data import blocks
from megatron_infoentropy.data.blocks import Block, BrokenLineError, Keys, read_blocks
from megatron_infoentropy.data.jsonl import rows_of
from megatron_infoentropy.data.manifest import DataOptions, Manifest, load_manifest
from megatron_infoentropy.data.sources import find_inputs
from megatron_infoentropy.data.verify import verify

pa = pytest.importorskip("pyarrow", reason="the extra parquet is not installed")
pq = pytest.importorskip("pyarrow.parquet")

pytestmark = pytest.mark.usefixtures("small_steps")
DOCUMENTS = [(f"text {i} \u00e9 " * (i % 40), "AB"[i % 2]) for i in range(400)]
LINES = [line(text, domain) for text, domain in DOCUMENTS]
ROWS = [json.loads(each) for each in LINES]
KEY = "meta.pile_set_name"


@pytest.fixture
def expected(prepare, tmp_path):
    """The dataset of the same documents as lines."""
    return prepare(write(tmp_path / "lines.jsonl", LINES), "lines")


def assert_same_dataset(made: Manifest, expected: Manifest) -> None:
    """All files are the same but the manifest, which names the inputs and has a span of each."""
    ours, theirs = (
        {name: replace(facts, bin_spans=[]) for name, facts in each.domains.items()}
        for each in (made, expected)
    )
    assert ours == theirs
    for path in expected.folder.iterdir():
        if path.name != "manifest.json":
            assert (made.folder / path.name).read_bytes() == path.read_bytes(), path.name
    lines = sum(facts.lines for facts in made.inputs)
    assert lines == sum(facts.documents for facts in made.inputs) == len(LINES)


def parquet(path: Path, rows: Sequence[dict[str, Any]] = ROWS, **options: Any) -> Path:
    table = pa.Table.from_pylist(list(rows))
    pq.write_table(table, path, **{"row_group_size": 150} | options)
    return path


def arrow(path: Path, table: Any, of: Any = pa.ipc.new_stream) -> Path:
    with of(path, table.schema) as writer:
        writer.write_table(table, max_chunksize=150)
    return path


def stream(path: Path, rows: Sequence[dict[str, Any]] = ROWS, **options: Any) -> Path:
    return arrow(path, pa.Table.from_pylist(list(rows)), **options)


def views(path: Path) -> Path:
    """Columns of other kinds of strings, one of them of categories, in a file of Arrow's."""
    table = pa.table(
        {
            "text": pa.array([text for text, _ in DOCUMENTS], pa.large_string()),
            KEY: pa.array([domain for _, domain in DOCUMENTS]).dictionary_encode(),
        }
    )
    return arrow(path, table, pa.ipc.new_file)


def saved(folder: Path) -> Path:
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    datasets.Dataset.from_list(ROWS).save_to_disk(folder, num_shards=3)
    return folder


def of_the_hub(folder: Path) -> Path:
    (folder / "data").mkdir(parents=True)
    for part in range(2):
        name = folder / "data" / f"train-0000{part}-of-00002.parquet"
        parquet(name, ROWS[200 * part : 200 * part + 200])
    return folder


MAKERS = {
    "a.parquet": parquet,
    "zstd.parquet": lambda path: parquet(path, compression="zstd", use_dictionary=False),
    "a.arrow": stream,
    "file.arrow": lambda path: stream(path, of=pa.ipc.new_file),
    "views.arrow": views,
    "saved": saved,
    "hub": of_the_hub,
}


@pytest.mark.parametrize("name", MAKERS)
def test_the_same_documents_give_the_same_bytes(prepare, name, expected, tmp_path):
    """Also in a run that goes on where it was stopped."""
    files = find_inputs([str(MAKERS[name](tmp_path / name))])
    made = prepare(files, workers=2)
    assert_same_dataset(made, expected)
    assert verify(made.folder, inputs=files) == []
    interrupted(prepare, files, 7, name="again")
    assert_same_dataset(prepare(files, "again"), expected)


def rows_of_all(blocks: Iterable[Block]) -> list[Any]:
    return [row for block in blocks for row in rows_of(block.data, block.is_table)]


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow", "a.jsonl", "a.jsonl.zst", "a.jsonl.gz"])
def test_reading_goes_on_from_any_block(name, tmp_path, monkeypatch):
    lines = [line(f"{i**9}" * (i % 20)) for i in range(5000)]  # compressed, several chunks too
    path = MAKERS.get(name, lambda path: write(path, lines))(tmp_path / name)
    whole = list(read_blocks(path, keys=Keys("text", KEY)))
    assert len(whole) > 5
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 2500)  # as of another version: blocks end elsewhere
    for first in (0, 1, len(whole) // 2, len(whole) - 2, len(whole) - 1):
        steps: list[int] = []
        rest = list(read_blocks(path, steps.append, whole[first].start, Keys("text", KEY)))
        assert rest[0].start == whole[first].start
        assert rows_of_all(rest) == rows_of_all(whole[first:])
        assert rest[-1] == whole[-1]
        assert sum(steps) == path.stat().st_size


def categories(path: Path, texts: Sequence[str]) -> Path:
    """A file in which each of the texts is written once, however many rows have it."""
    table = pa.table({"text": pa.array(texts).dictionary_encode()})
    if path.suffix == ".arrow":
        return arrow(path, table)
    pq.write_table(table, path)
    return path


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("a.arrow", categories),
        ("a.parquet", categories),
        ("a.parquet", lambda path, texts: parquet(path, [{"text": text} for text in texts])),
    ],
)
def test_a_text_of_many_rows_is_written_out_for_one_block_at_a_time(
    name, make, tmp_path, monkeypatch
):
    """Else a small file could fill the memory; pyarrow itself decodes a column of plain strings."""
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 1 << 19)
    path = make(tmp_path / name, ["x" * (1 << 16)] * 1000)
    assert path.stat().st_size < 1 << 20
    pool, before = pa.proxy_memory_pool(pa.default_memory_pool()), pa.default_memory_pool()
    pa.set_memory_pool(pool)
    try:
        sizes = [(block.lines, len(block.data)) for block in read_blocks(path)]
    finally:
        pa.set_memory_pool(before)
    assert sum(lines for lines, _ in sizes) == 1000
    assert max(size for _, size in sizes) < 2 << 19
    assert make is not categories or pool.max_memory() < 16 << 20


def test_bad_rows_are_counted_and_listed_by_their_number(prepare, tmp_path):
    texts = pa.array([None, b"a", b"\xff\xfe", "b \u4e2d".encode(), b"c"], pa.binary())
    texts = pa.Array.from_buffers(pa.string(), 5, texts.buffers())
    table = pa.table({"text": texts, "from": ["A", "A", "A", None, ""]})
    path = tmp_path / "a.parquet"
    pq.write_table(table, path)
    options = DataOptions(split_by="from")
    done = prepare(path, options=options, max_errors=4)
    assert (done.inputs[0].documents, done.inputs[0].rejected) == (1, 4)
    assert done.domains["A"].rejected == 2
    listed = (tmp_path / "out" / "rejected.tsv").read_text().splitlines()
    assert [entry.split("\t")[1:] for entry in listed[:2]] == [
        ["1", '"text" must be a string, got NoneType'],
        ["3", 'not UTF-8 at byte 0 of "text"'],
    ]
    assert all("no domain: expected a non-empty string at from" in entry for entry in listed[2:])
    with pytest.raises(BrokenLineError, match=r"a\.parquet:1: .*must be a string, got NoneType"):
        prepare(path, "no", options=options)


def damaged(path: Path, keep: slice = slice(None), at: int = 0, value: bytes = b"") -> Path:
    raw = path.read_bytes()[keep]
    path.write_bytes(raw[:at] + value + raw[at + len(value) :])
    return path


@pytest.mark.parametrize(
    ("name", "make", "message"),
    [
        ("a.parquet", lambda p: parquet(p, [{"body": "a"}]), r"parquet:1: no \"text\" column; "),
        (
            "a.parquet",
            lambda p: parquet(p, [{"text": ["a"]}]),
            'column "text" must hold strings, but is of type list<.*name another with --text-col',
        ),
        ("a.arrow", lambda p: stream(p, [{"text": 3}]), "must hold strings, but is of type int64"),
        ("a.parquet", lambda p: damaged(parquet(p), slice(-20)), "no Parquet file, or a damaged"),
        ("a.parquet", lambda p: damaged(parquet(p), slice(0)), "no Parquet file, or a damaged"),
        ("a.parquet", lambda p: damaged(parquet(p), at=30, value=b"\xff" * 99), "a damaged or"),
        ("a.parquet", lambda p: write(p, LINES), "no Parquet file, or a damaged"),
        ("a.arrow", lambda p: damaged(stream(p), slice(-8)), "does not end as a stream does"),
        ("a.arrow", lambda p: damaged(stream(p), slice(-900)), "no Arrow file, or a damaged"),
        (
            "a.arrow",
            lambda p: damaged(stream(p, of=pa.ipc.new_file), slice(-9)),
            "no Arrow file, or a damaged",
        ),
    ],
)
def test_a_file_without_texts_or_a_damaged_one_ends_the_run(prepare, name, make, message, tmp_path):
    path = make(tmp_path / name)
    with pytest.raises(BrokenLineError, match=message):
        prepare(path, max_errors=1000)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "make", [lambda path, texts: stream(path, [{"text": text} for text in texts]), categories]
)
def test_offsets_that_lead_out_of_a_file_are_followed_nowhere(make, tmp_path):
    """Of a file that was not written by Arrow: each of its numbers is wrong in turn."""
    path = make(tmp_path / "a.arrow", [f"text {i}" for i in range(8)])
    raw = path.read_bytes()
    for at in range(0, len(raw), 4):
        path.write_bytes(raw[:at] + b"\xf0\xff\xff\x7f" + raw[at + 4 :])
        try:
            rows = rows_of_all(read_blocks(path))
        except BrokenLineError:
            continue
        assert all(row[0] is None or len(row[0]) < 1000 for row in rows)


@pytest.mark.parametrize(
    ("name", "what", "text", "domain"),
    [
        ("a.parquet", "columns", "--text-column", "--domain-column"),
        ("a.jsonl", "keys", "--text-key", "--split-by"),
    ],
)
def test_other_columns_and_keys_can_be_used_throughout(name, what, text, domain, tmp_path):
    rows = [{"content": f"words and words {i}", "of.lang": "AB"[i % 2]} for i in range(20)]
    path = write(tmp_path / "a.jsonl", [*map(json.dumps, rows)])
    path = path if what == "keys" else parquet(tmp_path / name, rows)
    words = ("tokenizer", path, "--output", tmp_path / "bpe", "--vocab-size", 260)
    refused = str(command(*words).exception)
    assert f"the {what} are ['content', 'of.lang']; name another with --text-{what[:-1]}" in refused
    assert command(*words, text, "content").exit_code == 0
    made = command(
        *("preprocess", "--input", path, "--tokenizer", tmp_path / "bpe", "--output"),
        *(tmp_path / "out", text, "content", domain, "of.lang"),
    )
    assert made.exit_code == 0, made.output
    assert {path.name for path in (tmp_path / "out").glob("*.bin")} == {"a.bin", "b.bin"}


@pytest.mark.parametrize("names", [("{}-0.parquet", "x/y/{}-1.parquet"), ("{}/0.parquet",)])
def test_the_pattern_that_a_folder_of_splits_is_refused_with_finds_one(names, tmp_path):
    for split in ("train", "test"):
        touch(tmp_path, *(name.format(split) for name in names))
    with pytest.raises(ValueError, match="holds the splits test, train: name the files") as refused:
        find_inputs([str(tmp_path)])
    pattern = str(refused.value).split("'")[1]
    assert find_inputs([pattern]) == [tmp_path / name.format("test") for name in names]


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def test_a_pattern_that_is_a_file_s_name_is_that_file(tmp_path):
    touch(tmp_path, "data[1].jsonl", "data1.jsonl")
    for given, taken in (("data[1].jsonl", "data[1].jsonl"), ("data[0-9].jsonl", "data1.jsonl")):
        assert find_inputs([str(tmp_path / given)]) == [tmp_path / taken]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: (p / "dataset_dict.json").write_text('{"splits": ["train", "test"]}'), "/train"),
        (lambda p: (p / "state.json").write_text("{}"), "is no file of `datasets`"),
        (
            lambda p: touch(p, "a.parquet", "b.jsonl.zst"),
            r"holds Parquet files and others of lines, such as .*/b\.jsonl\.zst: name what to read",
        ),
    ],
)
def test_folders_of_which_no_one_dataset_can_be_made_are_refused(make, message, tmp_path):
    make(tmp_path)
    with pytest.raises(ValueError, match=message):
        find_inputs([str(tmp_path)])


@pytest.fixture
def store():
    files = fsspec.filesystem("memory")
    yield files
    files.rm("/", recursive=True)


def test_files_of_a_store_are_read_like_local_ones(prepare, store, expected, tmp_path):
    for name, part in (("1.jsonl.zst", LINES[:150]), ("2.jsonl", LINES[150:300])):
        store.pipe(f"/bucket/{name}", write(tmp_path / name, part).read_bytes())
    store.pipe("/bucket/3.parquet", parquet(tmp_path / "3.parquet", ROWS[300:]).read_bytes())
    files = find_inputs(["memory://bucket/?.*"])
    assert list(map(str, files)) == [
        f"memory:///bucket/{name}" for name in ("1.jsonl.zst", "2.jsonl", "3.parquet")
    ]
    made = prepare(files)
    assert_same_dataset(made, expected)
    assert verify(made.folder, inputs=files) == []
    assert pickle.loads(pickle.dumps(files)) == files  # as executors send them to other processes
    inode = (made.folder / "manifest.json").stat().st_ino
    assert prepare(files).inputs == made.inputs
    assert (made.folder / "manifest.json").stat().st_ino == inode  # it is done
    store.pipe("/bucket/2.jsonl", write(tmp_path / "2.jsonl", LINES[151:301]).read_bytes())
    with pytest.raises(ValueError, match="is not empty"):
        prepare(files)
    assert prepare(files, "s", shard=(0, 2)).inputs[0].name == "1.jsonl.zst"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("memory://bucket/none.jsonl", "no such input file: memory://bucket/none.jsonl"),
        ("nowhere://bucket/a.jsonl", "nowhere://bucket/a.jsonl can not be read .*nowhere"),
        ("file://{}/a.txt", r"must be a \.jsonl, .*, got /.*/a\.txt"),
    ],
)
def test_addresses_that_lead_nowhere_are_named(prepare, name, message, tmp_path):
    (tmp_path / "a.txt").touch()
    with pytest.raises(ValueError, match=message):
        prepare(find_inputs([name.format(tmp_path)]))


@pytest.mark.parametrize(
    ("of", "name"), [("FileSystem", "isdir"), ("FileSystem", "modified"), ("File", "read")]
)
def test_what_the_library_of_a_store_raises_is_a_sentence(prepare, store, monkeypatch, of, name):
    outage = type("OutageError", (Exception,), {})("no answer")
    store.pipe("/bucket/a.jsonl", b"{}")
    monkeypatch.setattr(getattr(memory, f"Memory{of}"), name, Mock(side_effect=outage))
    said = r"memory://bucket/a\.jsonl can not be read \(OutageError: no answer\)"
    with pytest.raises(ValueError, match=said):
        prepare(find_inputs(["memory://bucket/a.jsonl"]))


def test_an_object_is_known_by_its_store_and_its_path(prepare, store, tmp_path, monkeypatch):
    same_crc32 = ["/bucket/599430bd25.jsonl", "/bucket/f7633dd321.jsonl"]
    for name in same_crc32:
        store.pipe(name, f"{LINES[2]}\n".encode())
    found = find_inputs(["memory://bucket/*"])
    assert prepare(found).domains["A"].documents == 2
    local = write(tmp_path / "a.jsonl", LINES[2:3])
    for given in ([f"memory:/{same_crc32[0]}", "memory://bucket/*"], [f"file://{local}", local]):
        with pytest.raises(ValueError, match="is one file, given 2 times"):
            prepare(find_inputs(map(str, given)), "no")

    monkeypatch.setattr(memory.MemoryFileSystem, "modified", Mock(side_effect=NotImplementedError))
    more = f"{LINES[2]}\n{LINES[4]}\n".encode()
    when_reading(monkeypatch, found[0].name, lambda: store.pipe(same_crc32[0], more))
    with pytest.raises(ValueError, match=r"599430bd25\.jsonl changed while it was read"):
        prepare(found, "no")


def test_standard_input_is_read_once_and_neither_resumed_nor_sharded(
    expected, tokenizer_folder, tmp_path
):
    words = ("preprocess", "--input", "-", "--tokenizer", tokenizer_folder, "--output")
    text = "".join(f"{each}\n" for each in LINES)
    ran = command(*words, tmp_path / "out", given=text)
    assert ran.exit_code == 0, ran.output
    made = load_manifest(tmp_path / "out")
    assert_same_dataset(made, expected)
    assert replace(made.inputs[0], name="lines.jsonl", samples="") == replace(
        expected.inputs[0], samples=""
    )
    again = command(*words, tmp_path / "out", given=text)
    assert "is not empty" in str(again.exception)  # what it was made of cannot be looked at
    before = set(tmp_path.iterdir())
    broken = command(*words, tmp_path / "no", given=f"{text}no document\n")
    assert str(broken.exception).startswith(f"-:{len(LINES) + 1}: not JSON")
    assert set(tmp_path.iterdir()) == before  # nothing to go on from
    for more in (("--shard", "0/1"), ("--executor", "local", "--tasks", "1")):
        refused = command(*words, tmp_path / "no", *more, given=text)
        assert "standard input (-) can not be shared out" in str(refused.exception)
