"""The documentation's generated parts: what was run where and when, and how fast.

    tools/status.py run      run the tests of every feature this machine can run; write the results
    tools/status.py pages    rewrite the generated parts of the README, of docs/status.md and of
                             docs/benchmarks.md from the result files, with its pictures

No number stands there without its file under tools/results/.
"""

import csv
import re
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib as mpl
import yaml
from matplotlib.patches import Patch
from rich.table import Table

from megatron_infoentropy.bench.cases import HEADLINE
from megatron_infoentropy.bench.results import Row, provenance, read_csv, write_csv
from megatron_infoentropy.bench.table import number, tables
from megatron_infoentropy.evaluate import figure

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "tools" / "results"
PEERS = {  # provider: what the README calls it
    "torch": "PyTorch's cross entropy",
    "megatron fused": "Megatron's fused one",
    "paper eager": "the loss as published",
}
ASIDE = ("--numprocesses", "2", "--dist", "loadfile")  # as `make test`
FACTS = ("device", "torch", "megatron_core", "commit", "date")


def main() -> None:
    if sys.argv[1:] == ["run"]:
        run_features()
        sys.argv[1:] = ["pages"]
    if sys.argv[1:] != ["pages"]:
        sys.exit(__doc__)
    for page, text in generated().items():
        page.write_text(text, encoding="utf-8")


def run_features() -> None:
    """Run every feature's tests here; replaces this device's result file."""
    import torch

    here = {"cpu"} if not torch.cuda.is_available() else {"gpu"}
    if torch.cuda.device_count() > 1:
        here.add("multi_gpu")
    facts = provenance()
    rows = [
        {"feature": feature["feature"], "outcome": outcome_of(feature["tests"])}
        for feature in features()
        if feature["needs"] in here
    ]
    name = "gpu" if "gpu" in here else "cpu"
    write_csv(rows, {name: facts[name] for name in FACTS}, RESULTS / f"status_{name}.csv")


def outcome_of(tests: list[str]) -> str:
    """pytest's own closing words, e.g. "240 passed, 2 not run"; what failed goes to stderr."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *ASIDE, *tests]
    command += ["-m", "not slow"]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=False, errors="replace"
    )
    last = done.stdout.strip().splitlines()[-1]
    sys.stderr.write(done.stdout if done.returncode else f"{' '.join(tests)}: {last}\n")
    return re.sub(r"(, \d+ warnings?)? in [\d.]+s.*", "", last).replace("skipped", "not run")


def features() -> list[dict[str, Any]]:
    loaded: list[dict[str, Any]] = yaml.safe_load(
        (ROOT / "tools/features.yaml").read_text(encoding="utf-8")
    )
    return loaded


def generated() -> dict[Path, str]:
    """Return the pages that have generated parts, with those renewed, and the pictures."""
    docs = ROOT / "docs"
    parts = {
        ROOT / "README.md": {"speed": speed()},
        docs / "status.md": {"status": status_table()},
        docs / "benchmarks.md": {"bench": every_case()},
    }
    pages = {page: renewed(page.read_text(encoding="utf-8"), parts[page]) for page in parts}
    return pages | {docs / f"{path.stem}.svg": picture(path) for path in result_files()}


def renewed(page: str, parts: dict[str, str]) -> str:
    """The page with the text after each part's mark replaced."""
    for name, text in parts.items():
        block = f"<!-- {name} -->\n{text}<!-- /{name} -->"
        pattern = rf"<!-- {name} -->\n(?:.*?<!-- /{name} -->)?"
        page, count = re.subn(pattern, lambda _, b=block: b, page, count=1, flags=re.S)
        if count != 1:
            raise ValueError(f"the page has no <!-- {name} --> mark")
    return page


def status_table() -> str:
    results = {
        row["feature"]: row
        for path in sorted(RESULTS.glob("status_*.csv"))
        for row in csv.DictReader(path.open(encoding="utf-8"))
    }
    lines = ["| feature | run | device | date, commit |", "|---|---|---|---|"]
    for feature in features():
        row = results.get(feature["feature"])
        if row is None:
            lines.append(f"| {feature['feature']} | **never run** | | |")
            continue
        where = f"{row['device']}; torch {row['torch']}, megatron-core {row['megatron_core']}"
        when = f"{row['date']}, {row['commit']}"
        lines.append(f"| {feature['feature']} | {row['outcome']} | {where} | {when} |")
    return "\n".join(lines) + "\n"


def result_files() -> list[Path]:
    return sorted(RESULTS.glob("bench_*.csv"))


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


def every_case() -> str:
    """For the docs: every case of every result file, what is missing, and the kernels."""
    text = ""
    for path in result_files():
        rows, facts = read_csv(path)
        text += f"### {facts['device']} ([file](../tools/results/{path.name}))\n\n"
        text += f"![time of forward and backward by provider]({path.stem}.svg)\n\n"
        if judged := list(targets(rows)):
            text += f"{_table([['target', 'measured', 'met'], ['---'] * 3, *judged])}\n"
        text += f"torch {facts['torch']}, {facts['date']}, commit {facts['commit']}.\n\n"
        for case in dict.fromkeys(row.case for row in rows):
            for part in tables([row for row in rows if row.case == case]):
                text += f"{_sentence(part)}\n" if isinstance(part, str) else _markdown(part)
            text += "\n"
    return text


SHADES = {  # forward, backward: ours in blue, the others in grey
    "ours": (figure.SERIES[0], figure.SERIES[4]),
    "peer": (figure.MUTED, figure.GRID),
}


def picture(path: Path) -> str:
    """Return an SVG of the first case of a result file: a bar a provider, the fastest on top."""
    rows, facts = read_csv(path)
    first = [row for row in rows if row.kind == "loss" and row.case == rows[0].case]
    ms = {(row.provider, row.step): row.median_ms or 0.0 for row in first}
    whole = sorted(
        (row for row in first if row.step == "both"), key=lambda row: ms[row.provider, "both"]
    )
    names = [f"{row.provider}{'' if row.computes == 'cross entropy' else ' *'}" for row in whole]
    words = [f"{number(row.median_ms)} ms, {number(row.times_in_place)} x" for row in whole]
    with mpl.rc_context(figure.STYLE | {"font.size": 9, "axes.grid.axis": "x"}):
        axes = figure.panel(1.7 + 0.24 * len(whole))
        for step, shade in (("both", 1), ("forward", 0)):  # what shows of the first is backward
            lengths = [ms[row.provider, step] for row in whole]
            bars = axes.barh(names, lengths, color=[SHADES[row.by][shade] for row in whole])
            if step == "both":
                axes.bar_label(bars, words, padding=3)
        axes.invert_yaxis()
        axes.margins(x=0.5)  # for the words beside the longest
        axes.set_xlabel("median ms; x: times ours in place\n*: with the entropy")
        axes.set_title(f"{rows[0].case}\n{facts['device']}, {facts['date']}", loc="left")
        keys = [
            Patch(color=SHADES[by][shade], label=f"{who}, {step}")
            for by, who in (("ours", "ours"), ("peer", "others"))
            for shade, step in enumerate(("forward", "backward"))
        ]
        axes.legend(handles=keys, loc="upper right", fontsize=9)
        alternative = f"time of forward and backward by provider, {rows[0].case}"
        return figure.standalone(figure.finished(path.stem, axes, alternative, []).svg)


def _markdown(table: Table) -> str:
    heads = [str(column.header) for column in table.columns]
    columns = [[str(cell) for cell in column.cells] for column in table.columns]
    title = f"{_sentence(str(table.title)).strip()}\n\n" if table.title else ""
    return f"{title}{_table([heads, ['---'] * len(heads), *zip(*columns, strict=True)])}\n"


def _table(lines: list[Sequence[str]]) -> str:
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def _sentence(words: str) -> str:
    return f"{words[0].upper()}{words[1:]}.  "


class Target(NamedTuple):
    """A bound, set before measuring, on one number of one row: {ours} is our best in place,
    {backend} the kernels that it calls."""

    words: str
    bound: float
    provider: str
    step: str = "both"
    value: Callable[[Row], float | None] = lambda row: row.times_in_place
    is_least: bool = True


def _share(row: Row) -> float | None:
    return row.percent_of_limit


def _entropy_cost(row: Row) -> float | None:
    """Percent by which ours takes longer than the row, which is without the entropy."""
    return 100 / row.times_in_place - 100 if row.times_in_place else None


def _peak(row: Row) -> float | None:
    """In sizes of the logits, those included."""
    return 1 + row.peak_mib / (row.bytes / 3 / 2**20) if row.peak_mib and row.bytes else None


GPU = [
    Target("statistics, % of the copy bandwidth", 88, "{backend}", "statistics", _share),
    Target("gradient, % of the copy bandwidth", 90, "{backend}", "gradient", _share),
    Target("Megatron unfused, times ours", 7.5, "megatron unfused"),
    Target("Liger vocab-parallel, times ours", 3, "liger vocab-parallel"),
    Target("Transformer Engine, times ours", 0.97, "transformer engine"),
    Target("Transformer Engine in place, times ours", 0.97, "transformer engine in place"),
    Target(
        *("entropy, % over our plain cross entropy", 3, "{ours} (cross entropy)"),
        value=_entropy_cost,
        is_least=False,
    ),
    Target("peak memory, times the logits", 1.01, "{ours}", value=_peak, is_least=False),
    Target(
        *("fused output layer, hidden size 4096, ms", 37, "fused loss"),
        value=lambda row: row.median_ms if "hidden size 4096," in row.computes else None,
        is_least=False,
    ),
]
CPU = [
    Target("statistics, % of what bounds them", 80, "{backend}", "statistics", _share),
    Target("gradient, % of what bounds it", 80, "{backend}", "gradient", _share),
    Target("paper eager, times ours", 20, "paper eager"),
    Target("torch, times ours", 8, "torch"),
]
TARGETS = {  # of the first case of a file
    (*HEADLINE, "bfloat16", False): GPU,
    (2048, 32000, "float32", True): CPU,
}


def targets(rows: list[Row]) -> Iterator[list[str]]:
    """Cells (target, measured, met) of the targets that the file's first case belongs to."""
    first = rows[0]
    timed = [row for row in rows if row.case == first.case and row.median_ms is not None]
    known = {(row.provider.partition(", chunks")[0], row.step): row for row in timed}
    is_ours = {"by": "ours", "step": "both", "times_in_place": 1}
    ours = [r for r in timed if all(getattr(r, name) == is_ours[name] for name in is_ours)]
    name = ours[0].provider if ours else ""
    names = {"ours": name, "backend": name.removesuffix(" in place")}
    shape = (first.tokens, first.vocabulary, first.dtype, first.clock == "wall time")
    for target in TARGETS.get(shape, []):
        row = known.get((target.provider.format_map(names), target.step))
        value = target.value(row) if row else None
        bound = f"{target.words}: {'>=' if target.is_least else '<='} {target.bound:g}"
        if value is None:
            yield [bound, "", "not measured"]
        else:
            met = value >= target.bound if target.is_least else value <= target.bound
            yield [
                bound,
                number(value) if value >= 0 else f"{value:.2f}",
                "yes" if met else "**no**",
            ]


if __name__ == "__main__":
    main()
