"""The corpus: deterministic, without leaks between splits, and about the sizes it promises.

Of a standard library in miniature; the tutorials, which a test runs, make one of the real one.
"""

import re
from pathlib import Path

import pytest

from megatron_infoentropy.data.blocks import Keys
from megatron_infoentropy.data.corpus import DOCS, SOURCE, SPLITS, DomainSize, build_corpus
from megatron_infoentropy.data.jsonl import read_documents

SECTION = "\n".join(f"A line that is long enough to tell, number {i}." for i in range(9))
TOPICS = {"if": f"The if\n***\n{SECTION}", "all": f"All\n===\n{SECTION}\nMore.", "x": "The x"}
PACKAGE = '''
"""The module."""
class Outer:
    """  The class.

        Indented.
    """
    async def method(self):
        """The method."""
        def inner():
            "The inner \\ud800 one."
if True:
    try:
        def guarded():
            """The guarded."""
    except ImportError:
        def guarded():
            """The fallback."""
def silent(): pass
'''
PACKAGE_DOCS = (
    "pkg\n\nThe module.\n\n"
    "pkg.Outer\n\nThe class.\n\nIndented.\n\n"
    "pkg.Outer.method\n\nThe method.\n\n"
    "pkg.Outer.method.inner\n\nThe inner ? one.\n\n"
    "pkg.guarded\n\nThe guarded.\n\n"
    "pkg.guarded\n\nThe fallback.\n"
)


def library(root: Path) -> Path:
    """With everything that must be left out."""
    files = {
        **{f"module_{i}.py": f'"""Docs of {i}."""\nx = {i}\n' * 20 for i in range(200)},
        **{f"test/test_{i}.py": f'"""FORBIDDEN_DOCS"""\nassert {i}\n' * 9 for i in range(100)},
        "test/copy_of_test_1.py": '"""FORBIDDEN_DOCS"""\nassert 1\n' * 9,
        "copy_of_module_1.py": '"""Docs of 1."""\nx = 1\n' * 20,
        "pydoc_data/topics.py": f"# generated\ntopics = {TOPICS!r}\n",
        "site-packages/foreign.py": "FORBIDDEN",
        "dist-packages/foreign.py": "FORBIDDEN",
        "config-3.12-x86_64-linux-gnu/python-config.py": "FORBIDDEN",
        "_sysconfigdata__linux_x86_64-linux-gnu.py": "FORBIDDEN",
        "sitecustomize.py": "FORBIDDEN",
        "encodings/cp1252.py": "FORBIDDEN",
        "__pycache__/module.py": "FORBIDDEN",
        "empty/__init__.py": "\n",
        "broken.py": "def (:\n",
        "pkg/__init__.py": PACKAGE,
    }
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    (root / "latin.py").write_bytes(b"# caf\xe9 FORBIDDEN")
    return root


def texts_of(folder: Path) -> dict[str, dict[str, list[str]]]:
    """The texts of every split and domain."""
    texts: dict[str, dict[str, list[str]]] = {s: {DOCS: [], SOURCE: []} for s in SPLITS}
    for split in SPLITS:
        for record in read_documents(
            folder / f"{split}.jsonl.zst", Keys("text", "meta.pile_set_name")
        ):
            texts[split][record.domain or ""].append(record.text)
    return texts


def total(sizes: dict[tuple[str, str], DomainSize], *domains: str) -> int:
    return sum(size.bytes for (_, domain), size in sizes.items() if domain in domains)


def test_the_same_library_gives_the_same_bytes_wherever_it_is(tmp_path):
    for name in ("here", "there"):
        build_corpus(tmp_path / name, library=library(tmp_path / f"lib_{name}"), megabytes=0.1)
    names = {f"{split}.jsonl.zst" for split in SPLITS}
    assert {path.name for path in (tmp_path / "here").iterdir()} == names
    for name in names:
        assert (tmp_path / "here" / name).read_bytes() == (tmp_path / "there" / name).read_bytes()


def test_every_text_is_there_once_and_two_percent_are_held_out_twice_by_file(tmp_path):
    sizes = build_corpus(tmp_path / "out", library=library(tmp_path / "lib"), megabytes=0.2)
    texts = texts_of(tmp_path / "out")
    for (split, domain), size in sizes.items():
        found = texts[split][domain]
        assert size == (len(found), sum(len(text.encode()) for text in found))
        assert split == "train" or 0.01 < size.bytes / total(sizes, domain) <= 0.02
    docs, sources = (
        [text for split in SPLITS for text in texts[split][domain]] for domain in (DOCS, SOURCE)
    )
    assert not [text for text in docs + sources if "FORBIDDEN" in text and "assert" not in text]
    # The copy of module_1 has the same source (once) under another name (its docs differ).
    assert len(set(docs)) == len(docs) == 200 + 1 + 1 + 2
    assert len(set(sources)) == len(sources) == 200 + 100 + 2
    assert {PACKAGE_DOCS, TOPICS["all"], TOPICS["x"], "module_7\n\nDocs of 7.\n"} <= set(docs)
    assert "def (:\n" in sources
    for split in SPLITS[1:]:  # training has no docstring of a file that is held out
        of_docs, of_sources = (
            {n for text in texts[split][domain] for n in re.findall(r"Docs of (\d+)", text)}
            for domain in (DOCS, SOURCE)
        )
        assert of_docs - {"1"} == of_sources - {"1"} != set()


def test_tests_fill_up_to_the_size_asked_for(tmp_path):
    root = library(tmp_path / "lib")
    whole = build_corpus(tmp_path / "whole", library=root, megabytes=0.2)
    asked = total(whole, DOCS, SOURCE) - 2000
    less = build_corpus(tmp_path / "less", library=root, megabytes=asked / 1e6)
    assert asked - 300 < total(less, DOCS, SOURCE) <= asked  # a test more would be too much
    assert total(less, DOCS) == total(whole, DOCS)


def test_a_python_without_its_sources_is_named_and_nothing_is_left(tmp_path):
    root = library(tmp_path / "lib")
    with pytest.raises(ValueError, match=r"expected about 20 MB of text in .*lib, found 0\.1"):
        build_corpus(tmp_path / "out", library=root)
    with pytest.raises(ValueError, match=r"found 0\.0 MB"):
        build_corpus(tmp_path / "out", library=tmp_path / "missing")
    assert [path.name for path in tmp_path.iterdir()] == ["lib"]
