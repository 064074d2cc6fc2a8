"""Memory: it does not grow with the documents, and stays below three quarters of a gigabyte."""

import subprocess
import sys
from pathlib import Path

from text_files import line

MEASURE = """
import resource, sys
from pathlib import Path
from megatron_infoentropy.data.preprocess import preprocess
inputs, tokenizer, output = map(Path, sys.argv[1:])
preprocess([inputs], tokenizer, output)
status = Path("/proc/self/status").read_text()  # ru_maxrss would be that of the test's process
sys.stdout.write(f"{int(status.partition('VmHWM:')[2].split()[0]) * 1024} ")
sys.stdout.write(f"{resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024}")
"""


def peaks(text: Path, tokenizer: Path, output: Path) -> list[int]:
    """Bytes that the process and its largest worker had at most."""
    command = [sys.executable, "-c", MEASURE, str(text), str(tokenizer), str(output)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return [int(word) for word in done.stdout.split()]


def test_each_process_stays_small_and_documents_cost_nothing(
    tokenizer_folder: Path, tmp_path: Path
) -> None:
    """Megatron's writer takes 138 bytes a document; 24 are allowed here, with room for noise."""
    few, many = tmp_path / "few.jsonl", tmp_path / "many.jsonl"
    few.write_text(f"{line('a')}\n" * 1000)
    many.write_text(f"{line('a')}\n" * 200_000)
    small = peaks(few, tokenizer_folder, tmp_path / "small")
    large = peaks(many, tokenizer_folder, tmp_path / "large")
    # transformers, and torch with it, are imported once to load the tokenizer: 0.5 GB of it. A
    # worker imports neither; what is told of it is its parent at the moment it was started.
    assert max(large) < 0.75e9
    assert large[0] - small[0] < 24 * 200_000 + 60e6


def test_three_million_documents_are_written_without_being_held(tmp_path: Path) -> None:
    program = f"""
import sys
from pathlib import Path
import numpy as np
from megatron_infoentropy.data.writer import DatasetWriter
folder = Path({str(tmp_path)!r})
writer = DatasetWriter(folder / "a", vocab_size=300, lengths=folder / "lengths")
ones = np.ones(10_000, dtype=np.int64)
writer.add(ones, ones)
def peak():
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024
before = peak()
for _ in range(300):
    writer.add(ones, ones)
writer.finish()
sys.stdout.write(str(peak() - before))
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert int(done.stdout) < 3_000_000 * 24
