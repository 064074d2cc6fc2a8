"""Which commit the package's own files are at."""

import subprocess
from pathlib import Path

PACKAGE = Path(__file__).parents[1]


def revision_of(package: Path = PACKAGE) -> str | None:
    """The short git commit of the checkout that `package` lies at the top of, "-dirty" behind it
    where tracked files differ from it; None where it was installed without one."""
    if _git(package.parent, "rev-parse", "--show-toplevel") != str(package.parent.resolve()):
        return None  # no checkout, or somebody else's that it was installed into
    return _git(package.parent, "describe", "--always", "--dirty", "--exclude=*")


def _git(folder: Path, *words: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *words],
            capture_output=True,
            text=True,
            check=False,
            errors="replace",
        )
    except FileNotFoundError:  # no git on this machine
        return None
    return done.stdout.strip() or None
