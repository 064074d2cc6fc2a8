"""Shards and their union: byte for byte what one run writes, or an error that names what is off."""

import errno
import os
import resource
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from io import FileIO

import pytest
import zstandard
from golden import assert_same_files
from text_files import line, write

from megatron_infoentropy.data import rewrite
from megatron_infoentropy.data.manifest import DataOptions, load_manifest
from megatron_infoentropy.data.preprocess import parse_shard, preprocess, shard_inputs
from megatron_infoentropy.data.rewrite import merge
from megatron_infoentropy.data.verify import verify
from megatron_infoentropy.data.writer import DiskFull


@pytest.fixture
def inputs(tmp_path):
    """Five files; domain C is only in the last, domain E has no text in the first two."""
    files = []
    for number in range(5):
        lines = [line(f"file {number} text {i} " * (i % 9), "ABD"[i % 3]) for i in range(50)]
        lines.append(line("" if number < 2 else "at last", "E"))
        lines.append(line("", "never"))
        if number == 4:
            lines.append(line("only here", "C"))
        lines.insert(10, "{")
        files.append(write(tmp_path / f"{number}.jsonl.zst", lines))
    return files


@contextmanager
def few_open_files() -> Iterator[None]:
    """40 more than now."""
    before, free = resource.getrlimit(resource.RLIMIT_NOFILE), [os.dup(0) for _ in range(40)]
    for descriptor in free:  # they need not follow each other
        os.close(descriptor)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(free) + 1, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


@pytest.mark.parametrize(("number", "workers"), [(1, None), (3, 1), (5, 8)])
def test_merged_shards_are_what_one_run_writes(
    inputs, tokenizer_folder, tmp_path, number, workers, monkeypatch
):
    """Nor are all files of the parts open at once, as most users may have 1024."""
    monkeypatch.setattr("megatron_infoentropy.files._READ_AT_ONCE", 1 << 10)
    for index in range(number):
        shard = (index, number)
        preprocess(inputs, tokenizer_folder, tmp_path / "shards", shard=shard, max_errors=5)
    with few_open_files():
        merged = merge([tmp_path / "shards"], tmp_path / "merged", workers=workers)
    whole = preprocess(inputs, tokenizer_folder, tmp_path / "whole", max_errors=5)
    assert sorted(whole.domains) == ["A", "B", "C", "D", "E"]
    assert whole.left_out == {"never": 5}
    assert_same_files(tmp_path / "merged", tmp_path / "whole")
    assert merged.shard is None
    assert {path.name for path in (tmp_path / "merged").iterdir()} == {
        path.name for path in (tmp_path / "whole").iterdir()
    }


def test_every_file_is_in_one_shard_and_neighbours_stay_together(inputs):
    for number in range(1, 6):
        parts = [shard_inputs(inputs, (index, number)) for index in range(number)]
        assert [path for part in parts for path in part] == inputs
    with pytest.raises(ValueError, match="5 of them can not make 6 shards"):
        shard_inputs(inputs, (0, 6))
    with pytest.raises(ValueError, match=r"needs i in 0\.\.n-1, got 5/5"):
        shard_inputs(inputs, (5, 5))


def test_shards_are_written_as_a_fraction():
    assert parse_shard("3/10") == (3, 10)
    for text in ("3", "a/b", "3/", "/4", "-1/4", "1.5/2"):
        with pytest.raises(ValueError, match="must be i/n"):
            parse_shard(text)


def test_a_missing_shard_and_a_stranger_are_named(inputs, tokenizer_folder, tmp_path):
    for index in (0, 2):
        shard = (index, 3)
        preprocess(inputs, tokenizer_folder, tmp_path / "s", shard=shard, max_errors=5)
    preprocess(inputs, tokenizer_folder, tmp_path / "s", shard=(0, 1), max_errors=5)
    left_out = r"the 3 shards .* missing: 1, to be left out: shard-00000-of-00001"
    with pytest.raises(ValueError, match=left_out):
        merge([tmp_path / "s"], tmp_path / "out")
    options = DataOptions(append_eod=False)
    other = tmp_path / "other"
    preprocess(inputs, tokenizer_folder, other, options=options, max_errors=5)
    plain = tmp_path / "plain"
    preprocess(inputs, tokenizer_folder, plain, max_errors=5)
    with pytest.raises(ValueError, match="their options differ"):
        merge([plain, other], tmp_path / "out")
    with pytest.raises(ValueError, match="is no token dataset"):
        merge([tmp_path], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_shards_of_lists_that_differ_are_not_merged(inputs, tokenizer_folder, tmp_path):
    """What a file gained between two jobs moves the borders: one file would be in no shard."""
    out = tmp_path / "s"
    preprocess(inputs, tokenizer_folder, out, shard=(0, 2), max_errors=5)
    more = [line(f"word {number**3} " * 20) for number in range(2000)]
    inputs[0].write_bytes(inputs[0].read_bytes() + zstandard.compress("\n".join(more).encode()))
    preprocess(inputs, tokenizer_folder, out, shard=(1, 2), max_errors=5)
    with pytest.raises(ValueError, match="are shards of different lists of files"):
        merge([out], tmp_path / "out")
    with pytest.raises(ValueError, match="is not empty"):
        preprocess(inputs, tokenizer_folder, out, shard=(0, 2), max_errors=5)


@pytest.fixture
def whole(inputs, tokenizer_folder, tmp_path):
    return preprocess(inputs, tokenizer_folder, tmp_path / "whole", max_errors=5).folder


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("b.bin", lambda raw: raw[:6] + b"x" + raw[7:], r"b\.bin is .* manifest says \(checksum"),
        ("b.bin", lambda raw: raw[:-2], r"b\.bin is cut off"),
        ("b.bin", None, r"no such dataset file: .*b\.bin"),
        ("token_counts.npy", lambda raw: raw[:-8], r"token_counts\.npy can not be read: .*again"),
        (
            "token_counts.npy",
            lambda raw: raw[:-8] + b"\1" * 8,
            r"token_counts\.npy is not what its",
        ),
        ("token_counts.npy", None, r"token_counts\.npy can not be read"),
    ],
)
def test_a_damaged_part_is_not_merged(whole, tmp_path, name, damage, message):
    raw = (whole / name).read_bytes()
    (whole / name).unlink()
    if damage:
        (whole / name).write_bytes(damage(raw))
    with pytest.raises(ValueError, match=message):
        merge([whole], tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / ".out.partial").exists()


def test_what_ends_a_merge_leaves_no_output_and_the_next_one_is_whole(whole, tmp_path, monkeypatch):
    """A small disk, one that fills, and a kill in the middle of a file."""
    usage = shutil.disk_usage(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
        with pytest.raises(ValueError, match=r"of free space for .*out, got .* make room"):
            merge([whole], tmp_path / "out")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(rewrite, "write_all", full)
        with pytest.raises(DiskFull, match=r"no room .*\(No space left on device; .*make room"):
            merge([whole], tmp_path / "out")
    assert not (tmp_path / ".out.partial").exists()

    def killed(file: FileIO, data: bytes) -> None:
        file.write(data[: len(data) // 2])
        os.kill(os.getpid(), signal.SIGKILL)

    process = os.fork()
    if process == 0:
        rewrite.write_all = killed  # type: ignore[assignment]
        merge([whole], tmp_path / "out")
        os._exit(0)
    assert os.waitpid(process, 0)[1] == signal.SIGKILL
    assert not (tmp_path / "out").exists()
    merge([whole], tmp_path / "out")
    assert_same_files(tmp_path / "out", whole)
    with pytest.raises(ValueError, match="workers must be at least 1, got 0"):
        merge([whole], tmp_path / "no", workers=0)


def test_datasets_of_one_kind_are_joined_in_the_order_given(inputs, tokenizer_folder, tmp_path):
    for index, path in enumerate(inputs[:2]):
        preprocess([path], tokenizer_folder, tmp_path / str(index), max_errors=5)
    merge([tmp_path / "0", tmp_path / "1"], tmp_path / "both")
    preprocess(inputs[:2], tokenizer_folder, tmp_path / "whole", max_errors=5)
    assert_same_files(tmp_path / "both", tmp_path / "whole")
    assert load_manifest(tmp_path / "both").left_out == {"E": 2, "never": 2}


def test_damage_and_swapped_parts_are_seen_in_what_was_merged(inputs, tokenizer_folder, tmp_path):
    """Every part has its own checksum there, also after it was merged twice."""
    parts = [
        preprocess([path], tokenizer_folder, tmp_path / f"part-{path.stem}", max_errors=5).folder
        for path in inputs[:3]
    ]
    two = merge(parts[:2], tmp_path / "two").folder
    whole = merge([two, parts[2]], tmp_path / "whole")
    assert verify(whole.folder) == []
    path = whole.folder / "b.bin"
    first, second, third = (load_manifest(part).domains["B"].bin_spans[0] for part in parts)
    assert whole.domains["B"].bin_spans == [first, second, third]
    raw = path.read_bytes()
    ids = [raw[: first.bytes], raw[first.bytes : -third.bytes], raw[-third.bytes :]]

    def damaged() -> list[str]:
        return [each.problem for each in verify(whole.folder) if each.path == path]

    wrong = "does not have the checksum that the manifest says, from byte {} on"
    path.write_bytes(b"".join([ids[0], bytes([ids[1][0] ^ 1]), ids[1][1:], ids[2]]))
    assert damaged() == [wrong.format(first.bytes)]
    path.write_bytes(b"".join([ids[1], ids[0], ids[2]]))
    assert damaged()[0] == wrong.format(0)
    with pytest.raises(ValueError, match=r"b\.bin is not what its manifest says"):
        merge([whole.folder], tmp_path / "out")


def test_datasets_of_another_kind_are_not_joined(inputs, tokenizer_folder, tmp_path):
    folders = [tmp_path / "0", tmp_path / "1"]
    for path, folder in zip(inputs, folders, strict=False):
        preprocess([path], tokenizer_folder, folder, max_errors=5)
    ours, theirs = map(load_manifest, folders)
    others = {
        "tokenizer": replace(theirs.tokenizer, vocab_size=9),
        "dtype": "int32",
        "options": replace(theirs.options, append_eod=False),
        "versions": {"tokenizers": "0"},
    }
    for what, other in others.items():
        with pytest.raises(ValueError, match=f"can not be merged .* their {what} differ"):
            rewrite._require_same_kind([ours, replace(theirs, **{what: other})])
    rewrite._require_same_kind([ours, theirs])


def test_a_dataset_is_not_joined_with_itself_unless_asked(inputs, tokenizer_folder, tmp_path):
    a, b = (
        preprocess([path], tokenizer_folder, tmp_path / path.stem, max_errors=5).folder
        for path in inputs[:2]
    )
    renamed = inputs[0].rename(tmp_path / "renamed.jsonl.zst")
    same = preprocess([renamed], tokenizer_folder, tmp_path / "same", max_errors=5).folder
    both = merge([a, b], tmp_path / "both").folder
    joined = [zstandard.decompress(path.read_bytes()) for path in (renamed, inputs[1])]
    (tmp_path / "one.jsonl").write_bytes(b"".join(joined))
    one = preprocess([tmp_path / "one.jsonl"], tokenizer_folder, tmp_path / "o", max_errors=5)
    (tmp_path / "link").symlink_to(a)
    for parts, what in (
        ((a, tmp_path / "link"), "are the same folder"),
        ((a, b, same), "hold the same tokens"),
        ((both, one.folder), "hold the same tokens"),
        ((both, b), r"were both made of 1\.jsonl\.zst"),
    ):
        with pytest.raises(ValueError, match=f"{what}: .*--allow-duplicates"):
            merge(parts, tmp_path / "out")
        assert not (tmp_path / "out").exists()
    twice = merge([both, b], tmp_path / "out", allow_duplicates=True)
    assert sum(facts.documents for facts in twice.domains.values()) == 3 * 50
