"""What preparing data takes on machines that were not tried: a model, and what it says of the Pile.

    python tools/data_scale.py [--write]     prints the tables of docs/data-scale.md, or renews them

A task reads one file after another in one process and encodes in some others. What a megabyte of
text costs each of them was measured (tools/results/preprocess_cpu_202611.csv), and what a megabyte
of ids costs a merge (tools/results/merge_cpu_202611.csv). A run then takes

    start + megabytes of a task * max(reader, workers / W, all of it / cores)

as its parts work side by side, but not less than the machine's disk takes for its bytes.
"""

import argparse
import csv
import math
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "data-scale.md"
MEASURED_MB = 60.0  # of text, in the measured runs


@dataclass(frozen=True)
class Costs:
    """Seconds of CPU time: of a start, and a megabyte of text of a task's reader and workers."""

    start: float
    reader: float
    workers: float

    def seconds(self, megabytes: float, workers: int, cores: int) -> float:
        """Return what one task takes on a machine of its own."""
        return self.start + megabytes * max(
            self.reader, self.workers / workers, (self.reader + self.workers) / cores
        )


@dataclass(frozen=True)
class Corpus:
    """A corpus of files of one size; `stored` and `ids` are bytes a byte of text."""

    megabytes: float
    files: int
    domains: int
    stored: float
    ids: float


@dataclass(frozen=True)
class Machine:
    """One of several machines of a kind; `disk` in megabytes a second, of reading and writing."""

    cores: int
    disk: float


PILE = Corpus(800e3, 30, 22, stored=0.35, ids=0.58)
MACHINE = Machine(cores=32, disk=2000.0)


def rows_of(name: str) -> list[dict[str, str]]:
    with (ROOT / "tools" / "results" / name).open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def measured() -> tuple[dict[str, Costs], dict[str, float]]:
    """Return the costs of each engine, and the seconds of the runs that they are checked against.

    The start is what the CPU time of the fastest run leaves.
    """
    rows = {row["provider"]: row for row in rows_of("preprocess_cpu_202611.csv")}
    facts = rows["gigatoken x1"]
    parts = {
        engine: (
            float(facts[f"{engine}_reader_s_per_mb"]),
            float(facts[f"{engine}_workers_s_per_mb"]),
        )
        for engine in ("hf", "gigatoken")
    }
    start = float(facts["cpu_s"]) - MEASURED_MB * sum(parts["gigatoken"])
    runs = {name: float(row["whole_run_s"]) for name, row in rows.items()}
    return {engine: Costs(start, *both) for engine, both in parts.items()}, runs


@dataclass(frozen=True)
class Plan:
    """What is predicted for a number of machines, in seconds."""

    tasks: int
    workers: int
    preprocess: float
    bound: str
    merge: float


def predict(costs: Costs, machines: int, corpus: Corpus = PILE, machine: Machine = MACHINE) -> Plan:
    """Return the fastest way to share a corpus out, in tasks a machine and workers a task."""
    moved = corpus.megabytes / machines * (corpus.stored + corpus.ids) / machine.disk
    plans = []
    for workers in range(1, machine.cores):
        tasks = min(corpus.files, machines * (machine.cores // (workers + 1)))
        share = corpus.megabytes / corpus.files * math.ceil(corpus.files / tasks)
        seconds = costs.seconds(share, workers, workers + 1)
        bound = "workers" if costs.workers / workers > costs.reader else "the reader of a task"
        if moved > seconds:
            seconds, bound = moved, "disk"
        plans.append(Plan(tasks, workers, seconds, bound, merge_seconds(corpus, machine)))
    return min(plans, key=lambda plan: (plan.preprocess, plan.tasks * plan.workers))


def merge_seconds(corpus: Corpus, machine: Machine) -> float:
    """Return what one machine takes to join the shards, part by part on all its cores."""
    (row,) = (row for row in rows_of("merge_cpu_202611.csv") if row["command"] == "merge")
    work, ids = float(row["cpu_s"]) / float(row["bytes"]) * 1e6, corpus.megabytes * corpus.ids
    return max(ids * work / machine.cores, 2 * ids / machine.disk)


def files_of(plan: Plan, corpus: Corpus = PILE) -> int:
    """Count the files of all shards and of the whole: two a domain, the counts and the manifest."""
    return (plan.tasks + 1) * (2 * corpus.domains + 2)


def check() -> list[str]:
    costs, runs = measured()
    lines = ["| run | model | measured | |", "|---|---|---|---|"]
    for name in ("gigatoken x1", "gigatoken x2", "hf x1", "hf x2"):
        engine, workers = name.split(" x")
        model = costs[engine].seconds(MEASURED_MB, int(workers), 2)
        off = f"{model / runs[name] - 1:+.0%}" if name != "gigatoken x1" else "gives the start"
        lines.append(
            f"| `{engine}`, {workers} worker(s) | {model:.1f} s | {runs[name]:.1f} s | {off} |"
        )
    return lines


def predictions() -> list[str]:
    costs, _ = measured()
    lines = [
        "| engine | machines | tasks x workers | preprocess | bound by | merge | files |",
        "|---|---|---|---|---|---|---|",
    ]
    for engine in ("gigatoken", "hf"):
        for machines in (1, 8, 64):
            plan = predict(costs[engine], machines)
            lines.append(
                f"| `{engine}` | {machines} | {plan.tasks} x {plan.workers} | "
                f"{duration(plan.preprocess)} | {plan.bound} | {duration(plan.merge)} | "
                f"{files_of(plan)} |"
            )
    return lines


def duration(seconds: float) -> str:
    return f"{seconds / 3600:.1f} h" if seconds >= 3600 else f"{seconds / 60:.0f} min"


def renewed(page: str) -> str:
    """Return the page with both tables as they are computed now."""
    for name, lines in (("check", check()), ("predictions", predictions())):
        begin, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->"
        head, _, rest = page.partition(begin)
        page = f"{head}{begin}\n" + "\n".join(lines) + f"\n\n{end}{rest.partition(end)[2]}"
    return page


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--write", action="store_true", help="renew docs/data-scale.md")
    if parser.parse_args().write:
        PAGE.write_text(renewed(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    else:
        sys.stdout.write("\n".join([*check(), "", *predictions(), ""]))


if __name__ == "__main__":
    main()
