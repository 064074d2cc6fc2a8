"""Shards and their union: byte for byte what one run writes, or an error that names what is off."""

import errno
import os
import resource
import shutil
import signal
from dataclasses import replace
from io import FileIO
from unittest.mock import Mock

import pytest
import zstandard
from golden import assert_same_files
from text_files import line, write

from megatron_infoentropy.data import rewrite
from megatron_infoentropy.data.manifest import load_manifest
from megatron_infoentropy.data.preprocess import parse_shard, shard_inputs
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
        lines.insert(10, '{"text": 3, "meta": {"pile_set_name": "A"}}')
        files.append(write(tmp_path / f"{number}.jsonl.zst", lines))
    return files


@pytest.fixture
def few_open_files():
    """40 more than now."""
    before, free = resource.getrlimit(resource.RLIMIT_NOFILE), [os.dup(0) for _ in range(40)]
    for descriptor in free:  # they need not follow each other
        os.close(descriptor)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(free) + 1, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


@pytest.mark.parametrize(("number", "workers"), [(1, None), (3, 1), (5, 8)])
@pytest.mark.usefixtures("few_open_files")
def test_merged_shards_are_what_one_run_writes(
    prepare, inputs, tmp_path, number, workers, monkeypatch
):
    """Nor are all files of the parts open at once, as most users may have 1024."""
    monkeypatch.setattr("megatron_infoentropy.files._READ_AT_ONCE", 1 << 10)
    for index in range(number):
        prepare(inputs, "shards", shard=(index, number), max_errors=5)
    merged = merge([tmp_path / "shards"], tmp_path / "merged", workers=workers)
    whole = prepare(inputs, "whole", max_errors=5)
    assert sorted(whole.domains) == ["A", "B", "C", "D", "E"]
    # Megatron can not open an empty dataset; failing after a day would be worse.
    assert whole.left_out == {"never": 5}
    assert not list(whole.folder.glob("never.*"))
    assert_same_files(merged.folder, whole.folder)
    assert_same_files(whole.folder, merged.folder)


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


def test_a_missing_shard_and_a_stranger_are_named(prepare, inputs, tmp_path):
    for shard in ((0, 3), (2, 3), (0, 1)):
        prepare(inputs, "s", shard=shard, max_errors=5)
    left_out = r"the 3 shards .* missing: 1, to be left out: shard-00000-of-00001"
    for folder, message in ((tmp_path / "s", left_out), (tmp_path, "is no token dataset")):
        with pytest.raises(ValueError, match=message):
            merge([folder], tmp_path / "out")
        assert not (tmp_path / "out").exists()


def test_shards_of_lists_that_differ_are_not_merged(prepare, inputs, tmp_path):
    """What a file gained between two jobs moves the borders: one file would be in no shard."""
    prepare(inputs, "s", shard=(0, 2), max_errors=5)
    more = [line(f"word {number**3} " * 20) for number in range(2000)]
    inputs[0].write_bytes(inputs[0].read_bytes() + zstandard.compress("\n".join(more).encode()))
    prepare(inputs, "s", shard=(1, 2), max_errors=5)
    with pytest.raises(ValueError, match="are shards of different lists of files"):
        merge([tmp_path / "s"], tmp_path / "out")
    with pytest.raises(ValueError, match="is not empty"):
        prepare(inputs, "s", shard=(0, 2), max_errors=5)


@pytest.fixture
def whole(prepare, inputs):
    return prepare(inputs, "whole", max_errors=5).folder


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("b.bin", lambda raw: raw[:6] + b"x" + raw[7:], r"b\.bin is .* manifest says \(checksum"),
        ("b.bin", lambda raw: raw[:-2], r"b\.bin is cut off"),
        (
            "manifest.json",
            lambda raw: raw.replace(b'"documents": 85', b'"documents": 84', 1),
            r"a\.bin is not what its manifest says",
        ),
        ("b.bin", None, r"no such dataset file: .*b\.bin"),
        ("token_counts.npy", lambda raw: raw[:-8], r"token_counts\.npy can not be read: .*again"),
        ("token_counts.npy", lambda raw: raw[:-8] + b"\1" * 8, r"counts\.npy is not what its"),
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

    with monkeypatch.context() as patch:
        error = OSError(errno.ENOSPC, "No space left on device")
        patch.setattr(rewrite, "write_all", Mock(side_effect=error))
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


def test_datasets_are_joined_in_the_order_given_and_damage_in_each_part_is_seen(
    prepare, inputs, tmp_path
):
    """Every part has its own checksum, also after it was merged twice."""
    parts = [prepare(path, f"part-{path.stem}", max_errors=5).folder for path in inputs[:3]]
    two = merge(parts[:2], tmp_path / "two")
    assert_same_files(two.folder, prepare(inputs[:2], "whole", max_errors=5).folder)
    assert two.left_out == {"E": 2, "never": 2}
    made = merge([two.folder, parts[2]], tmp_path / "made")
    assert verify(made.folder) == []
    path = made.folder / "b.bin"
    first, second, third = (load_manifest(part).domains["B"].bin_spans[0] for part in parts)
    assert made.domains["B"].bin_spans == [first, second, third]
    raw = path.read_bytes()
    ids = [raw[: first.bytes], raw[first.bytes : -third.bytes], raw[-third.bytes :]]
    for damaged, at in (
        ([ids[0], bytes([ids[1][0] ^ 1]), ids[1][1:], ids[2]], first.bytes),
        ([ids[1], ids[0], ids[2]], 0),
    ):
        path.write_bytes(b"".join(damaged))
        found = [each.problem for each in verify(made.folder) if each.path == path]
        assert found[0] == f"does not have the checksum that the manifest says, from byte {at} on"
    with pytest.raises(ValueError, match=r"b\.bin is not what its manifest says"):
        merge([made.folder], tmp_path / "out")


def test_datasets_of_another_kind_are_not_joined(whole, tmp_path):
    manifest = load_manifest(whole)
    for what, other, message in (
        ("tokenizer", replace(manifest.tokenizer, vocab_size=9), "their tokenizer differ"),
        ("options", replace(manifest.options, append_eod=False), "their options differ"),
        ("versions", {"tokenizers": "0"}, "their versions differ"),
        ("domains", {"a": manifest.domains["A"]}, r"'A' and 'a' would both be written to a\.bin"),
    ):
        shutil.copytree(whole, tmp_path / what)
        changed = replace(manifest, folder=tmp_path / what, **{what: other})
        changed.save()
        with pytest.raises(ValueError, match=message):
            merge([whole, changed.folder], tmp_path / "out", allow_duplicates=True)


def test_a_dataset_is_not_joined_with_itself_unless_asked(prepare, inputs, tmp_path):
    a, b = (prepare(path, path.stem, max_errors=5).folder for path in inputs[:2])
    renamed = inputs[0].rename(tmp_path / "renamed.jsonl.zst")
    same = prepare(renamed, "same", max_errors=5).folder
    both = merge([a, b], tmp_path / "both").folder
    joined = [zstandard.decompress(path.read_bytes()) for path in (renamed, inputs[1])]
    (tmp_path / "one.jsonl").write_bytes(b"".join(joined))
    one = prepare(tmp_path / "one.jsonl", "o", max_errors=5)
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
