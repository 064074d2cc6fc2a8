"""The documentation's generated parts: what was run where and when, and how fast.

    tools/status.py run      run the tests of every feature this machine can run; write the results
    tools/status.py pages    rewrite the generated parts of the README, of docs/status.md and of
                             docs/benchmarks.md from the result files

No number stands there without its file under tools/results/.
"""

import csv
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tools"))  # also where this file is imported by its path
import bench_report  # noqa: E402

RESULTS = ROOT / "tools" / "results"
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

    from megatron_infoentropy.bench.results import provenance, write_csv

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
    """Return the pages that have generated parts, with those renewed."""
    docs = ROOT / "docs"
    parts = {
        ROOT / "README.md": {"speed": bench_report.speed()},
        docs / "status.md": {"status": status_table()},
        docs / "benchmarks.md": {"bench": bench_report.everything()},
    }
    return {page: renewed(page.read_text(encoding="utf-8"), parts[page]) for page in parts}


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


if __name__ == "__main__":
    main()
