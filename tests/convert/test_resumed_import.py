"""An interrupted import goes on where it was, and ends in the bytes of one that was not."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_checkpoint import tiny_args, tiny_tensors, write_checkpoint

from megatron_infoentropy.convert import convert_checkpoint, convert_from_hf
from megatron_infoentropy.convert.hf_weights import HuggingFaceWeights

FILE_BYTES = 20_000
STOP_AT = 31  # of 39 tensors: the gate of a layer was read, what belongs to it was not


@pytest.fixture
def hf(tmp_path: Path) -> Path:
    args = tiny_args(num_layers=4)
    write_checkpoint(tmp_path / "save", args, tiny_tensors(args))
    convert_checkpoint(tmp_path / "save", tmp_path / "hf")
    return tmp_path / "hf"


class Reads:
    """Stands between the import and the weights: notes what is read, and can interrupt."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.names: list[str] = []
        self.stop_at: int | None = None
        self._read = HuggingFaceWeights.read
        monkeypatch.setattr(HuggingFaceWeights, "read", lambda *words: self.read(*words))

    def read(self, weights: HuggingFaceWeights, name: str) -> torch.Tensor:
        if len(self.names) == self.stop_at:
            raise KeyboardInterrupt
        self.names.append(name)
        return self._read(weights, name)

    def of_import(self, hf: Path, output: Path, stop_at: int | None = None) -> list[str]:
        self.names, self.stop_at = [], stop_at
        if stop_at is None:
            convert_from_hf(hf, output, file_bytes=FILE_BYTES)
            return self.names
        with pytest.raises(KeyboardInterrupt):
            convert_from_hf(hf, output, file_bytes=FILE_BYTES)
        assert not output.exists()
        return self.names


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Reads:
    return Reads(monkeypatch)


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_what_was_written_is_neither_read_nor_written_again(
    hf: Path, tmp_path: Path, reads: Reads
) -> None:
    everything = reads.of_import(hf, tmp_path / "fresh")
    first = reads.of_import(hf, tmp_path / "out", stop_at=STOP_AT)
    partial = tmp_path / ".out.partial" / "release"
    pieces = sorted(partial.iterdir())
    assert len(pieces) > 2
    times = {path.name: path.stat().st_mtime_ns for path in pieces[:-1]}  # the last one grows
    second = reads.of_import(hf, tmp_path / "out")
    assert first[:-1] + second == everything
    release = tmp_path / "out" / "release"
    assert times == {name: (release / name).stat().st_mtime_ns for name in times}
    assert contents(tmp_path / "out") == contents(tmp_path / "fresh")


def test_a_piece_that_was_cut_off_is_written_again(hf: Path, tmp_path: Path, reads: Reads) -> None:
    """As after a power failure: numbers beyond the journal, and a journal that breaks off."""
    reads.of_import(hf, tmp_path / "fresh")
    for damage in ("more numbers", "half a line", "fewer numbers", "no journal"):
        written = reads.of_import(hf, tmp_path / "out", stop_at=STOP_AT)[:-1]
        partial = tmp_path / ".out.partial"
        last = max((partial / "release").iterdir())
        if damage == "more numbers":
            last.write_bytes(last.read_bytes() + bytes(5000))
            (partial / "release" / "__9_0.distcp").write_bytes(bytes(5000))
        elif damage == "half a line":
            (partial / ".pieces").write_text((partial / ".pieces").read_text()[:-9])
        elif damage == "fewer numbers":
            last.write_bytes(last.read_bytes()[:-1])
        else:
            (partial / ".pieces").unlink()
        second = reads.of_import(hf, tmp_path / "out")
        expected = {"more numbers": 0, "no journal": len(written)}.get(damage, 2)
        assert len(set(written) & set(second)) == expected, damage
        assert contents(tmp_path / "out") == contents(tmp_path / "fresh"), damage
        (tmp_path / "out").rename(tmp_path / damage)


def test_an_import_interrupted_while_it_is_proved_writes_nothing_again(
    hf: Path, tmp_path: Path, reads: Reads
) -> None:
    everything = reads.of_import(hf, tmp_path / "fresh")

    def interrupted(folder: Path) -> None:
        raise KeyboardInterrupt

    reads.names = []
    with pytest.raises(KeyboardInterrupt):
        convert_from_hf(hf, tmp_path / "out", file_bytes=FILE_BYTES, check=interrupted)
    assert reads.names == everything
    assert not reads.of_import(hf, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(tmp_path / "fresh")


def test_other_weights_start_anew(hf: Path, tmp_path: Path, reads: Reads) -> None:
    reads.of_import(hf, tmp_path / "out", stop_at=STOP_AT)
    weights = load_file(hf / "model.safetensors")
    weights["model.norm.weight"] += 1  # the sizes stay
    save_file(weights, hf / "model.safetensors", {"format": "pt"})
    assert len(reads.of_import(hf, tmp_path / "out")) == len(weights)
    reads.of_import(hf, tmp_path / "fresh")
    assert contents(tmp_path / "out") == contents(tmp_path / "fresh")
