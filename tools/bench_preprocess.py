"""Preprocessing beside its peers, in one run: whole-run time, steady rate, CPU time, and a model.

    python tools/bench_preprocess.py TEXT.jsonl TOKENIZER [--repeats 3] [--only NAME ...]

Every run is a process of its own, started cold, on the whole text and on its first half; providers
take turns, and of each the best counts, as other work on a machine only adds. Steady tokens/s is
what the second half adds: it is free of start-up. Peers:

    megatron   tools/preprocess_data.py of the checkout that MEGATRON_LM names, if it is set
    megatron fast   its preprocess_data_fast.py, in one process with gigatoken's threads, where the
               checkout has it and gigatoken and awkward are installed

Each provider's files are compared with those of the first, byte by byte.

The model splits the CPU time of one run into what the reading process and what the workers take per
megabyte: N workers need max(reader, workers / N).
"""

import argparse
import csv
import hashlib
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from megatron_infoentropy.data.manifest import DataOptions
from megatron_infoentropy.data.preprocess import preprocess

MODELLED_WORKERS = 64
Command = list[str]


def ours(engine: str, workers: int) -> Callable[[Path, Path, Path], Command]:
    """A run of `infoentropy preprocess` into one dataset."""
    return lambda text, tokenizer, out: [
        *(sys.executable, "-m", "megatron_infoentropy", "preprocess", "--split-by", ""),
        *("--input", str(text), "--tokenizer", str(tokenizer), "--output", str(out)),
        *("--workers", str(workers), "--engine", engine),
    ]


def megatron(checkout: Path, workers: int) -> Callable[[Path, Path, Path], Command]:
    """A run of Megatron's own tool."""
    return lambda text, tokenizer, out: [
        *(sys.executable, str(checkout / "tools" / "preprocess_data.py"), "--input", str(text)),
        *("--output-prefix", str(out), "--append-eod", "--workers", str(workers)),
        *("--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", str(tokenizer)),
    ]


def megatron_fast(checkout: Path) -> Callable[[Path, Path, Path], Command]:
    """A run of Megatron's tool for gigatoken, with the checkout's own megatron."""
    path = os.pathsep.join([str(checkout), os.environ.get("PYTHONPATH", "")])
    return lambda text, tokenizer, out: [
        *("env", f"PYTHONPATH={path}", sys.executable),
        *(str(checkout / "tools" / "preprocess_data_fast.py"), "--input", str(text)),
        *("--output-prefix", str(out), "--append-eod", "--use-gigatoken"),
        *("--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", str(tokenizer)),
    ]


def providers() -> dict[str, Callable[[Path, Path, Path], Command]]:
    """What can be run here, by name."""
    found = {"hf x1": ours("hf", 1), "hf x2": ours("hf", 2)}
    found["auto x2"] = ours("auto", 2)
    if find_spec("gigatoken"):
        found |= {"gigatoken x1": ours("gigatoken", 1), "gigatoken x2": ours("gigatoken", 2)}
    if "MEGATRON_LM" in os.environ:
        checkout = Path(os.environ["MEGATRON_LM"])
        found["megatron x2"] = megatron(checkout, 2)
        fast = (checkout / "tools" / "preprocess_data_fast.py").exists()
        if fast and find_spec("gigatoken") and find_spec("awkward"):
            found["megatron fast"] = megatron_fast(checkout)
    return found


def measure(command: Command) -> tuple[float, float]:
    """Seconds of wall and of CPU time of a process and all it starts."""
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wall, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def model(texts: dict[str, Path], tokenizer: Path, engine: str, folder: Path) -> dict[str, float]:
    """CPU seconds per megabyte of the reading process and of the workers, and what follows."""
    _costs(texts["half"], tokenizer, engine, folder / f"{engine}-imports")  # not timed twice
    readers, workers, megabytes, tokens = (
        whole - half
        for half, whole in zip(
            *(
                _costs(texts[size], tokenizer, engine, folder / f"{engine}-{size}")
                for size in texts
            ),
            strict=True,
        )
    )
    if min(readers, workers) <= 0:
        raise ValueError(f"{texts['whole']} is too small for what else this machine does just now")
    return {
        "reader_s_per_mb": readers / megabytes,
        "workers_s_per_mb": workers / megabytes,
        "saturates_at_workers": workers / readers,
        f"tokens_per_s_of_{MODELLED_WORKERS}": tokens / max(readers, workers / MODELLED_WORKERS),
    }


def _costs(text: Path, tokenizer: Path, engine: str, out: Path) -> tuple[float, float, float, int]:
    """CPU seconds of the reading process and of its worker, megabytes, tokens."""
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.process_time()
    made = preprocess([text], tokenizer, out, options=DataOptions(split_by=None), engine=engine)
    reader, after = time.process_time() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    worker = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    (facts,) = made.domains.values()
    return reader, worker, facts.bytes / 1e6, facts.tokens


def first_half(text: Path, folder: Path) -> Path:
    """The first half of the lines, as a file."""
    lines = text.read_bytes().splitlines(keepends=True)
    half = folder / "half.jsonl"
    half.write_bytes(b"".join(lines[: len(lines) // 2]))
    return half


def written(out: Path) -> tuple[int, str]:
    """Tokens that a run wrote, below a folder or behind a prefix, and the hash of its files."""
    pattern = "**/*.bin" if out.is_dir() else f"{out.name}*.bin"
    path = next(iter((out if out.is_dir() else out.parent).glob(pattern)))
    index = path.with_suffix(".idx").read_bytes()
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256")
    digest.update(index)
    return path.stat().st_size // (2 if index[17] == 8 else 4), digest.hexdigest()


def remove(out: Path) -> None:
    """What a run wrote, below a folder or behind a prefix."""
    if out.is_dir():
        shutil.rmtree(out)
    for path in out.parent.glob(f"{out.name}*.*"):
        path.unlink()


def compare(
    texts: dict[str, Path], tokenizer: Path, repeats: int, folder: Path, only: list[str]
) -> list[dict[str, Any]]:
    """One row a provider: the best of repeats in which all take turns."""
    chosen = {name: make for name, make in providers().items() if not only or name in only}
    walls: dict[tuple[str, str], list[float]] = {}
    cpus: dict[tuple[str, str], list[float]] = {}
    tokens: dict[str, int] = {}
    hashes: dict[tuple[str, str], str] = {}
    for repeat in range(repeats):
        for name, command in chosen.items():
            for size, path in texts.items():
                out = folder / f"{name.replace(' ', '-')}-{size}-{repeat}"
                wall, cpu = measure(command(path, tokenizer, out))
                walls.setdefault((name, size), []).append(wall)
                cpus.setdefault((name, size), []).append(cpu)
                tokens[size], hashes[name, size] = written(out)
                remove(out)
    rows = []
    for name in chosen:
        half, whole = (min(walls[name, size]) for size in texts)
        rows.append(
            {
                "provider": name,
                "whole_run_s": round(whole, 2),
                "steady_tokens_per_s": steady_rate(tokens["whole"] - tokens["half"], whole - half),
                "cpu_s": round(min(cpus[name, "whole"]), 2),
                "same_bytes": all(
                    hashes[name, size] == hashes[next(iter(chosen)), size] for size in texts
                ),
            }
        )
    return rows


def steady_rate(tokens: int, seconds: float) -> int | None:
    """Tokens per second of the second half; none where it is lost in the noise of starting up."""
    return round(tokens / seconds) if seconds > 2.0 else None


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write rows of the same columns as CSV."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("text", type=Path)
    parser.add_argument("tokenizer", type=Path)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--only", nargs="*", default=[], help="providers; default: all, and a model"
    )
    parser.add_argument("--output", type=Path, help="CSV file to write")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        texts = {"half": first_half(chosen.text, Path(name)), "whole": chosen.text}
        rows = compare(texts, chosen.tokenizer, chosen.repeats, Path(name), chosen.only)
        for row in rows:
            sys.stdout.write(f"{row}\n")
        engines = ["hf"] + (["gigatoken"] if find_spec("gigatoken") else [])
        engines = [] if chosen.only else engines
        models = {e: model(texts, chosen.tokenizer, e, Path(name)) for e in engines}
    for engine, found in models.items():
        sys.stdout.write(f"{engine}: { {key: round(value, 5) for key, value in found.items()} }\n")
    if chosen.output:
        from megatron_infoentropy.bench.results import provenance

        facts = {**provenance(), "tokenizers": version("tokenizers"), "text": chosen.text.name}
        facts |= {
            f"{e}_{key}": value for e, found in models.items() for key, value in found.items()
        }
        rows = [row | facts for row in rows]
        write_rows(chosen.output, rows)


if __name__ == "__main__":
    main()
