"""The text in Python's standard library: help topics, docstrings and source files.

Files are read and parsed, never imported: importing runs code, opens windows (`antigravity`) and
fails where a platform lacks something. Left out is what is not written by people or not the same on
every machine: build-time configuration (it holds paths), character tables, site-packages.
"""

import ast
import inspect
import re
import warnings
from collections.abc import Iterator
from pathlib import Path

_TOPICS = "pydoc_data/topics.py"
_TELLING_LINE = 30  # characters; longer lines do not occur in two topics by chance
_FOREIGN_FOLDERS = {"site-packages", "dist-packages", "__pycache__"}
# Generated: the help topics as one literal (they are documents themselves), character tables.
_GENERATED_FOLDERS = {"pydoc_data", "encodings"}
_TEST_FOLDERS = {"test", "tests", "idle_test"}
_LOCAL_FILE = re.compile(r"_sysconfigdata.*|sitecustomize|usercustomize")
_LOCAL_FOLDER = re.compile(r"config-.*")  # config-3.12-x86_64-linux-gnu and the like

Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def source_names(root: Path) -> list[str]:
    """The library's own source files below `root`, as sorted `email/message.py` names."""
    names = []
    for folder, folders, files in root.walk():
        folders[:] = [name for name in folders if not _is_skipped_folder(name)]
        for file in files:
            path = folder / file
            if path.suffix == ".py" and not _LOCAL_FILE.fullmatch(path.stem):
                names.append(path.relative_to(root).as_posix())
    return sorted(names)


def is_test(name: str) -> bool:
    """Whether a source file belongs to the library's tests."""
    return not _TEST_FOLDERS.isdisjoint(name.split("/"))


def read_source(root: Path, name: str) -> str | None:
    """The file's text, or None where it is not UTF-8 (some test data is not, on purpose)."""
    try:
        return (root / name).read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError:
        return None


def help_topics(root: Path) -> dict[str, str]:
    """The texts behind `help("topic")`, by topic; empty where they are not installed.

    Many topics are also sections of a larger one ("with" of "compound"); those are left out, or the
    same text would be trained and tested on.
    """
    path = root / _TOPICS
    if not path.is_file():
        return {}
    topics: dict[str, str] = {}
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "topics":
            topics = ast.literal_eval(node.value)
    return _without_sections(topics)


def _without_sections(topics: dict[str, str]) -> dict[str, str]:
    kept: dict[str, str] = {}
    seen: set[str] = set()
    for name in sorted(topics, key=lambda name: (-len(topics[name]), name)):
        # Headings are underlined differently in sections, and short lines repeat anyway.
        lines = {line for line in topics[name].splitlines() if len(line) > _TELLING_LINE}
        if 2 * len(lines & seen) <= len(lines):
            kept[name] = topics[name]
            seen |= lines
    return kept


def documentation(name: str, source: str) -> str:
    """All docstrings of one file under their qualified names; empty where it has none.

    A file that is not Python of this version (the tests have such) has none.
    """
    module = name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    try:
        with warnings.catch_warnings(action="ignore"):
            tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return ""
    entries = []
    for title, node in _documented(tree, module):
        docstring = ast.get_docstring(node, clean=False)
        if docstring and docstring.strip():
            entries.append(f"{title}\n\n{inspect.cleandoc(docstring)}\n")
    # A docstring may spell half of a surrogate pair, which no file can hold.
    return "\n".join(entries).encode(errors="replace").decode()


def _is_skipped_folder(name: str) -> bool:
    return name in _FOREIGN_FOLDERS | _GENERATED_FOLDERS or bool(_LOCAL_FOLDER.fullmatch(name))


def _documented(node: ast.AST, title: str) -> Iterator[tuple[str, Documented]]:
    if isinstance(node, Documented):
        yield title, node
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _documented(child, f"{title}.{child.name}")
        elif isinstance(child, ast.stmt | ast.ExceptHandler):  # definitions under if, try, with
            yield from _documented(child, title)
