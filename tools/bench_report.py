"""What README and docs/benchmarks.md say of the result files, from the files: tables, pictures."""

import sys
import textwrap
from pathlib import Path

import bench_targets

from megatron_infoentropy.bench.plot import plot
from megatron_infoentropy.bench.results import Row, read_csv
from megatron_infoentropy.bench.table import more_than_ours, not_measured, number

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
        for case in dict.fromkeys(row.case for row in rows):
            of_case = [row for row in rows if row.case == case]
            text += f"{_heading(of_case, facts)}.\n\n{_losses(of_case)}\n{_kernels(of_case)}"
            text += _linear(of_case) + _steps(of_case)
            text += "".join(f"{_sentence(words)}\n" for words in not_measured(of_case)) + "\n"
    return text


def _heading(rows: list[Row], facts: dict[str, str]) -> str:
    row = rows[0]
    return (
        f"Forward and backward of {row.case} logits, {facts['device']}, {row.threads} threads, "
        f"torch {facts['torch']}, {facts['date']}, commit {facts['commit']}"
    )


def _losses(rows: list[Row]) -> str:
    whole = [row for row in rows if row.kind == "loss" and row.step == "both"]
    ms = {(row.provider, row.step): row.median_ms for row in rows if row.kind == "loss"}
    sends = any(row.collectives for row in whole)
    heads = ["", "computes", "forward ms", "backward ms", "both ms (p20-p80)", "x in place"]
    heads += ["MiB beside the logits", *(["collectives, bytes a token"] if sends else [])]
    lines = [heads, ["---"] * len(heads)]
    for row in whole:
        steps = [number(ms.get((row.provider, step))) for step in ("forward", "backward")]
        both = f"{number(row.median_ms)} ({number(row.p20_ms)}-{number(row.p80_ms)})"
        name = f"**{row.provider}**" if row.by == "ours" else row.provider
        cells = [name, row.computes, *steps, both, number(row.times_in_place), number(row.peak_mib)]
        if sends:
            cells.append(f"{row.collectives}, {(row.collective_bytes or 0) / row.tokens:.0f}")
        lines.append(cells)
    return _table(lines) if whole else ""


def _kernels(rows: list[Row]) -> str:
    alone = [row for row in rows if row.kind in ("kernel", "limit")]
    counted = any(row.dram_read_bytes for row in alone)
    heads = ["alone", "", "ms (p20-p80)", "GB/s", "% of", *(["bytes moved"] if counted else [])]
    lines = [heads, ["---"] * len(heads)]
    for row in alone:
        share = f"{number(row.percent_of_limit)} of {row.limit}" if row.limit else ""
        time = f"{number(row.median_ms)} ({number(row.p20_ms)}-{number(row.p80_ms)})"
        cells = [row.provider, row.step, time, number(row.gb_per_s), share]
        if counted:
            moved = (row.dram_read_bytes or 0) + (row.dram_write_bytes or 0)
            cells.append(f"{moved / row.bytes:.3f} of least" if moved and row.bytes else "")
        lines.append(cells)
    return _table(lines) + "\n" if alone else ""


def _linear(rows: list[Row]) -> str:
    found = [row for row in rows if row.kind == "linear"]
    lines = [["output layer and loss", "ms (p20-p80)", "MiB beside the inputs"], ["---"] * 3]
    for row in found:
        time = f"{number(row.median_ms)} ({number(row.p20_ms)}-{number(row.p80_ms)})"
        lines.append([row.provider, time, number(row.peak_mib)])
    return f"Alone: {found[0].computes}.\n\n{_table(lines)}\n" if found else ""


def _steps(rows: list[Row]) -> str:
    found = [row for row in rows if row.kind == "step"]
    heads = ["training step", "computes", "ms (p20-p80)", "ms more than ours (95 %)"]
    lines = [[*heads, "loss, % of step", "MiB beside the weights"], ["---"] * 6]
    for row in found:
        computes = row.computes.partition("; ")[0]
        time = f"{number(row.median_ms)} ({number(row.p20_ms)}-{number(row.p80_ms)})"
        middle, interval = more_than_ours(row)
        more = f"{middle} ({interval})" if middle else ""
        name = f"**{row.provider}**" if row.by == "ours" else row.provider
        share = number(row.percent_of_step)
        lines.append([name, computes, time, more, share, number(row.peak_mib)])
    model = found[0].computes.partition("; ")[2] if found else ""
    return f"In training: Megatron GPT, {model}.\n\n{_table(lines)}\n" if found else ""


def _table(lines: list[list[str]]) -> str:
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def _alternative(rows: list[Row]) -> str:
    return f"time of forward and backward by provider, {rows[0].case}"


def _sentence(words: str) -> str:
    return f"{words[0].upper()}{words[1:]}.  "


def _link(path: Path, folder: Path) -> str:
    return str(path.relative_to(folder, walk_up=True))


if __name__ == "__main__":
    sys.exit("run `tools/status.py readme`")
