"""The `infoentropy` command, which says in one sentence what to install where a package is missing.

The loss itself needs torch and numpy alone; every command needs an extra of pyproject.toml.
"""

import sys

from megatron_infoentropy.runtime.device import keep_memory

EXTRA_OF = {  # command -> the extra that installs what it needs
    **dict.fromkeys(("corpus", "tokenizer", "preprocess", "merge", "pack"), "data"),
    **dict.fromkeys(("blend", "inspect", "verify"), "data"),
    **dict.fromkeys(("train", "launch", "doctor", "bench", "bench-recipe"), "megatron"),
    **dict.fromkeys(("convert", "convert-from-hf"), "convert"),
    **dict.fromkeys(("evaluate", "compare", "report"), "evaluate"),
    "tasks": "tasks",
    "study": "all",
}


def main() -> None:
    """Run the command line; a missing package is one sentence on stderr and exit code 1."""
    if sys.argv[1:2] in (["evaluate"], ["tasks"]):  # models in this process, window by window
        keep_memory()
    try:
        from megatron_infoentropy.cli import main as run

        run()
    except ModuleNotFoundError as error:
        package = (error.name or "").split(".")[0]
        if package in ("", "megatron_infoentropy"):
            raise
        sys.exit(explain_missing(package, sys.argv[1] if len(sys.argv) > 1 else ""))


def explain_missing(package: str, command: str) -> str:
    """Return what to install for a command (or an option) that lacks a package."""
    extra = EXTRA_OF.get(command, "all")
    name = f"infoentropy {command}" if command in EXTRA_OF else "the command infoentropy"
    return (
        f"infoentropy: {name} needs the package {package}, which is not installed: "
        f"pip install 'megatron-infoentropy[{extra}]'"
    )


if __name__ == "__main__":
    main()
