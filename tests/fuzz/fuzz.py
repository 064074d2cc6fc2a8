"""Fuzzes the readers for long: `python tests/fuzz/fuzz.py --seconds 1800 [NAME...]`, `make fuzz`.

With atheris, where it is installed, guided by coverage; otherwise by mutation alone. Ends a harness
after the seconds or --runs executions, writes a line into tools/results/fuzz_cpu.csv, and keeps an
input that ends in anything but a named error as tests/fuzz/corpus/NAME/crash-*.
"""

import argparse
import csv
import hashlib
import os
import random
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

ROOT = Path(__file__).parents[2]
LOG = ROOT / "tools" / "results" / "fuzz_cpu.csv"
FIELDS = ("harness", "engine", "executions", "seconds", "findings", "commit", "date")
NAMES = ("text", "index", "recipe", "metadata", "arguments", "weights", "manifest")


class Counted:
    """A harness that counts its executions and stops at the limits."""

    def __init__(self, name: str, seconds: float, runs: int) -> None:
        from readers import CORPUS, execute

        memory = Path("/dev/shm")
        place = memory if memory.is_dir() else None
        self._folder = Path(tempfile.mkdtemp(prefix="fuzz-", dir=place))
        self._execute, self._corpus, self.name = execute, CORPUS / name, name
        self._start, self._seconds, self._runs = time.monotonic(), seconds, runs
        self.executions = self.findings = 0

    @property
    def is_over(self) -> bool:
        return self.executions >= self._runs or self.seconds >= self._seconds

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._start

    def __call__(self, data: bytes) -> None:
        self.executions += 1
        try:
            self._execute(self.name, data, self._folder)
        except BaseException as error:
            self.findings += 1
            kept = self._corpus / f"crash-{hashlib.sha256(data).hexdigest()[:12]}"
            kept.parent.mkdir(parents=True, exist_ok=True)
            kept.write_bytes(data)
            sys.stderr.write(f"{kept}: {type(error).__name__}: {error}\n")

    def write_down(self, engine: str) -> None:
        words = ["git", "describe", "--always", "--dirty"]
        commit = subprocess.run(words, cwd=ROOT, capture_output=True, text=True).stdout.strip()
        is_new = not LOG.exists()
        with LOG.open("a", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            if is_new:
                writer.writerow(FIELDS)
            numbers = (self.executions, round(self.seconds), self.findings)
            writer.writerow([self.name, engine, *numbers, commit, date.today().isoformat()])


def by_mutation(harness: Counted) -> None:
    from readers import mutated, seeds_of

    rng, seeds = random.Random(time.time_ns()), seeds_of(harness.name)
    while not harness.is_over:
        harness(mutated(rng, seeds))
    harness.write_down("mutation")


def by_coverage(name: str, seconds: float, runs: int) -> None:
    """Never returns: libFuzzer ends the process."""
    import atheris

    with atheris.instrument_imports(include=["megatron_infoentropy", "json", "yaml", "pickle"]):
        from readers import seeds_of
    harness = Counted(name, seconds, runs)
    with tempfile.TemporaryDirectory() as folder:
        for number, data in enumerate(seeds_of(name)):
            (Path(folder) / str(number)).write_bytes(data)

        def one(data: bytes) -> None:
            harness(data)
            if harness.is_over:
                harness.write_down("atheris")
                os._exit(bool(harness.findings))

        atheris.Setup([sys.argv[0], "-rss_limit_mb=8192", "-verbosity=0", folder], one)
        atheris.Fuzz()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", default=NAMES)
    parser.add_argument("--seconds", type=float, default=1800)
    parser.add_argument("--runs", type=int, default=10_000_000)
    given = parser.parse_args()
    try:
        import atheris  # noqa: F401
    except ImportError:
        for name in given.names:
            by_mutation(Counted(name, given.seconds, given.runs))
        return
    for name in given.names:
        pid = os.fork()
        if pid == 0:
            by_coverage(name, given.seconds, given.runs)
        os.waitpid(pid, 0)


if __name__ == "__main__":
    main()
