"""Merging beside copying: `infoentropy merge` of parts against `cat` of their bytes, in turn.

    python tools/bench_merge.py FOLDER [--parts 8] [--megabytes 128] [--output FILE.csv]

FOLDER is on the disk to measure. Both end when the disk has all of it. A row each, in seconds: the
best wall and CPU time of all turns, as other work on a machine only adds, and the bytes of ids.
"""

import argparse
import os
import sys
import tempfile
from pathlib import Path

import numpy as np
from bench_preprocess import measure, remove, write_rows

from megatron_infoentropy.bench.results import provenance
from megatron_infoentropy.data.manifest import DataOptions, Manifest, TokenizerFacts
from megatron_infoentropy.data.writer import DatasetWriter, finish

VOCAB, DOCUMENT = 50257, 600  # entries; tokens, as in the Pile's mean


def make_part(folder: Path, number: int, tokens: int) -> Path:
    """Write one dataset of random ids in documents of one length."""
    folder.mkdir()
    writer = DatasetWriter(folder / "all", vocab_size=VOCAB, lengths=folder / "lengths")
    size = tokens - tokens % DOCUMENT
    ids = np.random.default_rng(number).integers(0, VOCAB, size, dtype=np.uint16)
    writer.add(ids, np.full(ids.size // DOCUMENT, DOCUMENT))
    facts = TokenizerFacts("", VOCAB, 0)
    options = DataOptions(split_by=None)
    made = Manifest(
        folder=folder, tokenizer=facts, dtype="uint16", append_eod=True, domains={}, options=options
    )
    finish(made, {"all": writer})
    writer.close()
    (folder / "lengths").unlink()
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--parts", type=int, default=8)
    parser.add_argument("--megabytes", type=int, default=128, help="of ids a part")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path, help="CSV file to write")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=chosen.folder) as name:
        folder, tokens = Path(name), chosen.megabytes * 500_000
        parts = [make_part(folder / f"{n}", n, tokens) for n in range(chosen.parts)]
        ids = " ".join(f"{part}/all.bin" for part in parts)
        out = folder / "out"
        commands = {
            "cat": ["sh", "-c", f"cat {ids} > {out}.bin && sync {out}.bin"],
            "merge": [
                *(sys.executable, "-m", "megatron_infoentropy", "merge", *map(str, parts)),
                *("--output", str(out)),
            ],
        }
        times: dict[str, list[tuple[float, float]]] = {each: [] for each in commands}
        for _ in range(chosen.repeats):
            for each, command in commands.items():
                os.sync()
                times[each].append(measure(command))
                remove(out)
        size = sum((part / "all.bin").stat().st_size for part in parts)
    rows = []
    for each, found in times.items():
        wall, cpu = (round(min(column), 2) for column in zip(*found, strict=True))
        rows.append({"command": each, "parts": chosen.parts, "bytes": size, "wall_s": wall})
        rows[-1] |= {"cpu_s": cpu, **provenance()}
        sys.stdout.write(f"{each}: {wall} s, {cpu} s of CPU time, {size / wall / 1e6:.0f} MB/s\n")
    if chosen.output:
        write_rows(chosen.output, rows)


if __name__ == "__main__":
    main()
