"""One rank of `infoentropy doctor --distributed --ranks N`: ORDER (JSON) and REPORT (a file)."""

import json
import sys
from dataclasses import asdict
from pathlib import Path

from megatron_infoentropy.doctor.job import Order, RankMissing, examine_job


def main() -> None:
    words = json.loads(sys.argv[1])
    paths = {k: Path(words[k]) if words[k] else None for k in ("recipe", "data", "tokenizer")}
    order = Order(
        **paths,
        run=Path(words["run"]),
        disk=int(words["disk"]),
        timeout_s=int(words["timeout_s"]),
    )
    try:
        report = examine_job(order)
    except RankMissing as error:
        sys.exit(f"doctor: {error}")
    if report is not None:
        temporary = Path(sys.argv[2] + ".tmp")
        temporary.write_text(json.dumps(asdict(report)))
        temporary.rename(sys.argv[2])


if __name__ == "__main__":
    main()
