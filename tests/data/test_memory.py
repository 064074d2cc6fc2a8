"""Memory: it does not grow with the documents, and stays below three quarters of a gigabyte."""

import subprocess
import sys
from pathlib import Path

from text_files import line

PEAK = """
import resource, sys
from pathlib import Path
def peak():  # ru_maxrss would be that of the test's process
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024
"""
PREPROCESS = """
from megatron_infoentropy.data.preprocess import preprocess
tokenizer, *texts = map(Path, sys.argv[1:])
for text in texts:
    preprocess([text], tokenizer, text.with_suffix(""))
    print(peak())
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024)
"""


def numbers(program: str, *words: Path) -> list[int]:
    command = [sys.executable, "-c", PEAK + program, *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return [int(word) for word in done.stdout.split()]


def test_each_process_stays_small_and_documents_cost_nothing(tokenizer_folder, tmp_path):
    """Megatron's writer takes 138 bytes a document; 24 are allowed here, with room for noise."""
    few, many = tmp_path / "few.jsonl", tmp_path / "many.jsonl"
    few.write_text(f"{line('a')}\n" * 1000)
    many.write_text(f"{line('a')}\n" * 200_000)
    after_few, after_many, worker = numbers(PREPROCESS, tokenizer_folder, few, many)
    # transformers, and torch with it, are imported once to load the tokenizer: 0.5 GB of it. A
    # worker imports neither; what is told of it is its parent at the moment it was started.
    assert max(after_many, worker) < 0.75e9
    assert after_many - after_few < 24 * 200_000 + 20e6


def test_three_million_documents_are_written_without_being_held(tmp_path):
    program = """
import numpy as np
from megatron_infoentropy.data.writer import DatasetWriter
folder = Path(sys.argv[1])
writer = DatasetWriter(folder / "a", vocab_size=300, lengths=folder / "lengths")
ones = np.ones(10_000, dtype=np.int64)
writer.add(ones, ones)
before = peak()
for _ in range(300):
    writer.add(ones, ones)
writer.finish()
print(peak() - before)
"""
    (grown,) = numbers(program, tmp_path)
    assert grown < 3_000_000 * 24
