"""What README and docs/benchmarks.md say of the result files, from the files: tables, pictures."""

import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path

import bench_targets
from bench_plot import plot
from rich.table import Table

from megatron_infoentropy.bench.results import Row, read_csv
from megatron_infoentropy.bench.table import number, tables

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "tools" / "results"
PEERS = {  # provider: what the README calls it
    "torch": "PyTorch's cross entropy",
    "megatron fused": "Megatron's fused one",
    "paper eager": "the loss as published",
}


def result_files() -> list[Path]:
    return sorted(RESULTS.glob("bench_*.csv"))


def picture_of(path: Path) -> Path:
    return ROOT / "docs" / f"{path.stem}.svg"


def draw_pictures() -> None:
    """One picture a result file, beside the docs."""
    for path in result_files():
        plot(path, picture_of(path))


def speed() -> str:
    """Return the README's sentences: ours beside its peers, at the first case of every file."""
    sentences = []
    for path in result_files():
        rows, facts = read_csv(path)
        of_case = [row for row in rows if row.kind == "loss" and row.case == rows[0].case]
        ms = {row.provider: row.median_ms for row in of_case if row.step == "both"}
        ours = min(
            (row for row in of_case if (row.by, row.computes) == ("ours", "infoentropy")),
            key=lambda row: (row.step != "both", row.times_in_place or float("inf")),
        )
        new_tensor = ms.get(ours.provider.removesuffix(" in place"))
        peers = [f"{number(ms[name])} for {PEERS[name]}" for name in PEERS if name in ms]
        sentences.append(
            f"{facts['device']}: cross entropy and entropy, forward and backward of {ours.case} "
            f"logits, take {number(ours.median_ms)} ms with the gradient written over the logits, "
            f"as the trainer does, {number(new_tensor)} ms with a new tensor for it. Beside them: "
            f"{', '.join(peers)}."
        )
    sentences.append("How this was measured: [docs/benchmarks.md](docs/benchmarks.md).")
    return textwrap.fill(" ".join(sentences), 108, break_on_hyphens=False) + "\n"


def everything(folder: Path) -> str:
    """For the docs: every case of every result file, what is missing, and the kernels."""
    text = ""
    for path in result_files():
        rows, facts = read_csv(path)
        text += f"### {facts['device']} ([file]({_link(path, folder)}))\n\n"
        text += f"![{_alternative(rows)}]({_link(picture_of(path), folder)})\n\n"
        if targets := list(bench_targets.lines(rows)):
            text += f"{_table([['target', 'measured', 'met'], ['---'] * 3, *targets])}\n"
        text += f"torch {facts['torch']}, {facts['date']}, commit {facts['commit']}.\n\n"
        for case in dict.fromkeys(row.case for row in rows):
            for part in tables([row for row in rows if row.case == case]):
                text += f"{_sentence(part)}\n" if isinstance(part, str) else _markdown(part)
            text += "\n"
    return text


def _markdown(table: Table) -> str:
    heads = [str(column.header) for column in table.columns]
    columns = [[str(cell) for cell in column.cells] for column in table.columns]
    title = f"{_sentence(str(table.title)).strip()}\n\n" if table.title else ""
    return f"{title}{_table([heads, ['---'] * len(heads), *zip(*columns, strict=True)])}\n"


def _table(lines: list[Sequence[str]]) -> str:
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def _alternative(rows: list[Row]) -> str:
    return f"time of forward and backward by provider, {rows[0].case}"


def _sentence(words: str) -> str:
    return f"{words[0].upper()}{words[1:]}.  "


def _link(path: Path, folder: Path) -> str:
    return str(path.relative_to(folder, walk_up=True))


if __name__ == "__main__":
    sys.exit("run `tools/status.py readme`")
