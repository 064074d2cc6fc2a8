"""A real corpus that every machine already has, in the Pile's own format.

The running Python's standard library gives two domains, as different as two domains of the Pile:

    Python docs     help topics, and the docstrings of each library file as one document
    Python source   the library's source files, filled up with its tests to the size asked for

train, validation and test are split by *file*, not by document: a file and its docstrings are in
the same split, so no domain leaks into another. Validation and test get up to 2 % of the bytes of
each domain.

The same Python gives the same bytes: order and split come from the SHA-256 of the names, and
neither times nor paths of the machine are in the text.

Files are read and parsed, never imported: importing runs code, opens windows (`antigravity`) and
fails where a platform lacks something. Left out is what is not written by people or not the same on
every machine: build-time configuration (it holds paths), character tables, site-packages.
"""

import ast
import hashlib
import inspect
import json
import re
import sysconfig
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import zstandard

from megatron_infoentropy.files import new_folder
from megatron_infoentropy.progress import progress

DOCS = "Python docs"
SOURCE = "Python source"
SPLITS = ("train", "validation", "test")
_HELD_OUT = 0.02  # of the bytes of a domain, once for validation and once for test
_ZSTD_LEVEL = 9
_TOPICS = "pydoc_data/topics.py"
_TELLING_LINE = 30  # characters; longer lines do not occur in two topics by chance
# Folders and files. Generated: the help topics as one literal (they are documents themselves),
# character tables, and config-3.12-x86_64-linux-gnu and the like.
_SKIPPED = re.compile(
    r"site-packages|dist-packages|__pycache__|pydoc_data|encodings|config-.*|_sysconfigdata.*"
    r"|(site|user)customize\.py"
)
_TEST_FOLDERS = {"test", "tests", "idle_test"}

Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


class Document(NamedTuple):
    """One text of the corpus and the domain it is told apart by."""

    domain: str
    text: str


class DomainSize(NamedTuple):
    """Documents and UTF-8 bytes of their texts."""

    documents: int
    bytes: int


Unit = tuple[str, list[Document]]  # a name, and documents that must stay in one split


def build_corpus(
    output: Path,
    *,
    megabytes: float = 20.0,
    library: Path | None = None,
    overwrite: bool = False,
) -> dict[tuple[str, str], DomainSize]:
    """Write train, validation and test `.jsonl.zst` of at most `megabytes` (10^6 bytes of text).

    `library` is the folder to read, by default the standard library of the running Python.

    Returns:
        What the files hold, by (split, domain).

    Raises:
        ValueError: the library is there in small part only (less than a quarter of the size asked
            for), or `output` is not empty and may not be overwritten.
    """
    root = library or Path(sysconfig.get_path("stdlib"))
    names = {split: f"{split}.jsonl.zst" for split in SPLITS}
    with new_folder(output, replaceable=[*names.values()], overwrite=overwrite) as folder:
        units = _collect(root, int(megabytes * 1e6))
        size = sum(_domain_bytes(documents).total() for _, documents in units)
        if size < megabytes * 1e6 / 4:
            raise ValueError(
                f"expected about {megabytes:g} MB of text in {root}, found {size / 1e6:.1f} MB; "
                "this Python comes without most of its library's sources: install them or use "
                "another Python"
            )
        splits = _split(units)
        for split, name in names.items():
            _write(folder / name, splits[split])
    sizes = {}
    for split, documents in splits.items():
        numbers, sums = Counter(document.domain for document in documents), _domain_bytes(documents)
        for domain in (DOCS, SOURCE):
            sizes[split, domain] = DomainSize(numbers[domain], sums[domain])
    return sizes


def _collect(root: Path, limit: int) -> list[Unit]:
    """Return units in the order of their hashes, each text once, tests up to `limit` bytes."""
    units = []
    seen: set[bytes] = set()  # digests: the texts themselves would stay in memory
    left = limit
    with progress("build corpus", limit, "bytes") as advance:
        for name, documents in _units(root):
            fresh = [document for document in documents if _digest(document.text) not in seen]
            seen.update(_digest(document.text) for document in fresh)
            size = _domain_bytes(fresh).total()
            if size > left:
                break
            left -= size
            advance(size)
            if fresh:
                units.append((name, fresh))
    return sorted(units, key=lambda unit: _digest(unit[0]))


def _units(root: Path) -> Iterator[Unit]:
    topics = _help_topics(root)
    for topic in sorted(topics, key=_digest):
        yield topic, [Document(DOCS, topics[topic])]
    for name, source, is_test in _sources(root):
        documents = [Document(SOURCE, source)]
        if not is_test and (docs := _documentation(name, source)):
            documents.insert(0, Document(DOCS, docs))
        yield name, documents


def _sources(root: Path) -> Iterator[tuple[str, str, bool]]:
    """Yield the library's own files: `email/message.py`, the text, and whether it is a test.

    The tests come last: what they say of themselves is no documentation.
    """
    paths = (path.relative_to(root) for path in root.rglob("*.py"))
    own = [path for path in paths if not any(map(_SKIPPED.fullmatch, path.parts))]
    files = [(not _TEST_FOLDERS.isdisjoint(path.parts), path.as_posix()) for path in own]
    for is_test, name in sorted(files, key=lambda file: (file[0], _digest(file[1]))):
        try:
            source = (root / name).read_bytes().decode("utf-8-sig")
        except UnicodeDecodeError:  # some test data is not, on purpose
            continue
        if source.strip():
            yield name, source, is_test


def _help_topics(root: Path) -> dict[str, str]:
    """Return the texts behind `help("topic")`, by topic; empty where they are not installed.

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
    kept: dict[str, str] = {}
    seen: set[str] = set()
    for name in sorted(topics, key=lambda name: (-len(topics[name]), name)):
        # Headings are underlined differently in sections, and short lines repeat anyway.
        lines = {line for line in topics[name].splitlines() if len(line) > _TELLING_LINE}
        if 2 * len(lines & seen) <= len(lines):
            kept[name] = topics[name]
            seen |= lines
    return kept


def _documentation(name: str, source: str) -> str:
    """Return all docstrings of one file under their qualified names; empty where it has none.

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


def _documented(node: ast.AST, title: str) -> Iterator[tuple[str, Documented]]:
    if isinstance(node, Documented):
        yield title, node
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _documented(child, f"{title}.{child.name}")
        elif isinstance(child, ast.stmt | ast.ExceptHandler):  # definitions under if, try, with
            yield from _documented(child, title)


def _split(units: list[Unit]) -> dict[str, list[Document]]:
    """Fill validation, then test, in the order of the units; what does not fit is for training."""
    whole = _domain_bytes(document for _, documents in units for document in documents)
    share = {domain: int(_HELD_OUT * total) for domain, total in whole.items()}
    room = {split: Counter(share) for split in SPLITS[1:]}
    splits: dict[str, list[Document]] = {split: [] for split in SPLITS}
    for _, documents in units:
        needed = _domain_bytes(documents)
        split = next((split for split, left in room.items() if needed <= left), "train")
        if split in room:
            room[split] -= needed
        splits[split] += documents
    return splits


def _domain_bytes(documents: Iterable[Document]) -> Counter[str]:
    sizes: Counter[str] = Counter()
    for domain, text in documents:
        sizes[domain] += len(text.encode())
    return sizes


def _write(path: Path, documents: list[Document]) -> None:
    lines = (
        json.dumps({"text": text, "meta": {"pile_set_name": domain}}, ensure_ascii=False) + "\n"
        for domain, text in documents
    )
    compressor = zstandard.ZstdCompressor(level=_ZSTD_LEVEL, write_checksum=True)
    path.write_bytes(compressor.compress("".join(lines).encode()))


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()
