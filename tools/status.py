"""The README's generated parts: what was run where and when, and how fast.

    tools/status.py run       run the tests of every feature this machine can run; write the results
    tools/status.py readme    rewrite the README's generated parts from the result files

No number stands in the README without its file under tools/results/.
"""

import csv
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "tools" / "results"
FIELDS = ("feature", "outcome", "device", "torch", "megatron_core", "commit", "date")


def main() -> None:
    if sys.argv[1:] == ["run"]:
        run_features()
        sys.argv[1:] = ["readme"]
    if sys.argv[1:] != ["readme"]:
        sys.exit(__doc__)
    readme = ROOT / "README.md"
    readme.write_text(generated(readme.read_text()))


def run_features() -> None:
    """Run every feature's tests here; replaces this device's result file."""
    import torch

    from megatron_infoentropy.bench.provenance import provenance

    here = {"cpu"} if not torch.cuda.is_available() else {"gpu"}
    if torch.cuda.device_count() > 1:
        here.add("multi_gpu")
    facts = provenance()
    rows = [
        {"feature": feature["feature"], "outcome": outcome_of(feature["tests"]), **facts}
        for feature in features()
        if feature["needs"] in here
    ]
    name = "gpu" if "gpu" in here else "cpu"
    with (RESULTS / f"status_{name}.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def outcome_of(tests: list[str]) -> str:
    """pytest's own closing words, e.g. "240 passed, 2 skipped"."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    last = done.stdout.strip().splitlines()[-1]
    return re.sub(r" in [\d.]+s.*", "", last)


def features() -> list[dict[str, Any]]:
    loaded: list[dict[str, Any]] = yaml.safe_load((ROOT / "tools/features.yaml").read_text())
    return loaded


def generated(readme: str) -> str:
    """The README with its generated parts renewed."""
    for name, text in (("status", status_table()), ("bench", bench_table())):
        block = f"<!-- {name} -->\n{text}<!-- /{name} -->"
        pattern = rf"<!-- {name} -->\n(?:.*?<!-- /{name} -->)?"
        readme, count = re.subn(pattern, lambda _, b=block: b, readme, count=1, flags=re.S)
        if count != 1:
            raise ValueError(f"README.md has no <!-- {name} --> mark")
    return readme


def status_table() -> str:
    results = {
        row["feature"]: row
        for path in sorted(RESULTS.glob("status_*.csv"))
        for row in csv.DictReader(path.open())
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


def bench_table() -> str:
    """One table a result file of `infoentropy bench`."""
    text = ""
    for path in sorted(RESULTS.glob("bench_*.csv")):
        rows = list(csv.DictReader(path.open()))
        first = rows[0]
        text += (
            f"Forward and backward of {first['tokens']} x {first['vocabulary']} {first['dtype']} "
            f"logits, {first['device']}, {first['threads']} threads, torch {first['torch']}, "
            f"{first['date']}, commit {first['commit']} ([file](tools/results/{path.name}); "
            "`make bench` repeats it):\n\n"
            "| | median ms | peak MiB beside the logits | x native | x native in place |\n"
            "|---|---|---|---|---|\n"
        )
        joins = [row for row in rows if not row["peak_mib"]]
        for row in rows:
            if row in joins:
                continue
            text += (
                f"| {row['provider']} | {float(row['median_ms']):.0f} | "
                f"{float(row['peak_mib']):.0f} | {_times(row, 'native')} | "
                f"{_times(row, 'native in place')} |\n"
            )
        for row in joins:
            text += f"\n{row['provider'].capitalize()}: {float(row['median_ms']):.1f} ms."
        text += "\n\n"
    return text


def _times(row: dict[str, str], ours: str) -> str:
    """A ratio, where that way of ours runs on the device."""
    value = row.get(f"times_{ours}")
    return f"{float(value):.1f}" if value else ""


if __name__ == "__main__":
    main()
