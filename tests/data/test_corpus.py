"""The corpus: deterministic, without leaks between splits, and about the sizes it promises."""

import sysconfig
from pathlib import Path

import pytest

from megatron_infoentropy.data import corpus as corpus_module
from megatron_infoentropy.data.blocks import Keys
from megatron_infoentropy.data.corpus import DOCS, SOURCE, SPLITS, DomainSize, build_corpus
from megatron_infoentropy.data.jsonl import read_documents

MEGABYTES = 8.0  # less than the smallest Python has, more than its help topics


Sizes = dict[tuple[str, str], DomainSize]
Texts = dict[str, list[tuple[str, str]]]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> tuple[Sizes, Texts]:
    """What it is said to hold, and (domain, text) of every document, by split."""
    folder = tmp_path_factory.mktemp("corpus") / "out"
    sizes = build_corpus(folder, megabytes=MEGABYTES)
    return sizes, {split: texts_of(folder, split) for split in SPLITS}


def texts_of(folder: Path, split: str) -> list[tuple[str, str]]:
    records = read_documents(folder / f"{split}.jsonl.zst", Keys("text", "meta.pile_set_name"))
    return [(record.domain or "", record.text) for record in records]


def total(sizes: Sizes) -> int:
    return sum(size.bytes for size in sizes.values())


def test_the_sizes_are_those_of_the_files_and_two_percent_are_held_out_twice(
    corpus: tuple[Sizes, Texts],
) -> None:
    sizes, texts = corpus
    for (split, domain), size in sizes.items():
        found = [text for name, text in texts[split] if name == domain]
        assert size == (len(found), sum(len(text.encode()) for text in found))
        if split != "train":
            whole = sum(sizes[split, domain].bytes for split in SPLITS)
            assert 0.015 < size.bytes / whole <= 0.02
    assert 0.95 * MEGABYTES * 1e6 <= total(sizes) <= MEGABYTES * 1e6


def test_the_docstrings_of_a_file_are_in_the_split_of_the_file(
    corpus: tuple[Sizes, Texts],
) -> None:
    """Held-out docstrings are exactly those of the held-out files, so training has none of them."""
    root, texts = Path(sysconfig.get_path("stdlib")), corpus[1]
    topics = set(corpus_module.help_topics(root).values())
    sources = {
        corpus_module.read_source(root, name): name
        for name in corpus_module.source_names(root)
        if not corpus_module.is_test(name)
    }
    for split in SPLITS[1:]:
        expected = {
            corpus_module.documentation(sources[text], text)
            for domain, text in texts[split]
            if domain == SOURCE and text in sources
        }
        found = {text for domain, text in texts[split] if domain == DOCS and text not in topics}
        assert len(found) > 3
        assert found == expected - {""}


def library(root: Path) -> Path:
    """A standard library in miniature, with everything that must be left out."""
    files = {
        **{f"module_{i}.py": f'"""Docs of {i}."""\nx = {i}\n' * 20 for i in range(60)},
        **{f"test/test_{i}.py": f"assert {i}\n" * 40 for i in range(30)},
        "copy_of_module_1.py": '"""Docs of 1."""\nx = 1\n' * 20,
        "pydoc_data/topics.py": "topics = {'if': 'The if statement', 'for': 'The for statement'}",
        "site-packages/foreign.py": "FORBIDDEN",
        "dist-packages/foreign.py": "FORBIDDEN",
        "config-3.12-x86_64-linux-gnu/python-config.py": "FORBIDDEN",
        "_sysconfigdata__linux_x86_64-linux-gnu.py": "FORBIDDEN",
        "sitecustomize.py": "FORBIDDEN",
        "encodings/cp1252.py": "FORBIDDEN",
        "__pycache__/module.py": "FORBIDDEN",
        "empty/__init__.py": "\n",
        "broken.py": "def (:\n",
    }
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    (root / "latin.py").write_bytes(b"# caf\xe9 FORBIDDEN")
    return root


def test_the_same_library_gives_the_same_bytes_wherever_it_is(tmp_path: Path) -> None:
    for name in ("here", "there"):
        build_corpus(tmp_path / name, library=library(tmp_path / f"lib_{name}"), megabytes=0.03)
    names = {f"{split}.jsonl.zst" for split in SPLITS}
    assert {path.name for path in (tmp_path / "here").iterdir()} == names
    for name in names:
        assert (tmp_path / "here" / name).read_bytes() == (tmp_path / "there" / name).read_bytes()


def test_what_is_not_the_library_is_left_out(tmp_path: Path) -> None:
    build_corpus(tmp_path / "out", library=library(tmp_path / "lib"), megabytes=0.05)
    texts = [text for split in SPLITS for _, text in texts_of(tmp_path / "out", split)]
    assert not [text for text in texts if "FORBIDDEN" in text]
    assert "def (:\n" in texts
    assert "module_7\n\nDocs of 7.\n" in texts
    assert "The if statement" in texts
    # The copy of module_1 has the same source (once) under another name (its docs differ).
    assert len(set(texts)) == len(texts) == 60 + 61 + 30 + 2 + 1


def test_tests_fill_up_to_the_size_asked_for(tmp_path: Path) -> None:
    root = library(tmp_path / "lib")
    whole = build_corpus(tmp_path / "whole", library=root, megabytes=0.05)
    less = build_corpus(tmp_path / "less", library=root, megabytes=total(whole) / 1e6 - 0.002)
    missing = total(whole) - total(less)
    assert 2000 <= missing < 2600
    assert all(less[split, DOCS].documents for split in SPLITS)
    docs = [sum(s[split, DOCS].bytes for split in SPLITS) for s in (whole, less)]
    assert docs[0] == docs[1]


def test_a_python_without_its_sources_is_named_and_nothing_is_left(tmp_path: Path) -> None:
    root = library(tmp_path / "lib")
    with pytest.raises(ValueError, match=r"expected about 20 MB of text in .*lib, found 0\.0"):
        build_corpus(tmp_path / "out", library=root)
    with pytest.raises(ValueError, match=r"found 0\.0 MB"):
        build_corpus(tmp_path / "out", library=tmp_path / "missing")
    assert [path.name for path in tmp_path.iterdir()] == ["lib"]


def test_docstrings_are_found_where_they_are_and_named() -> None:
    source = '''
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
    assert corpus_module.documentation("pkg/__init__.py", source) == (
        "pkg\n\nThe module.\n\n"
        "pkg.Outer\n\nThe class.\n\nIndented.\n\n"
        "pkg.Outer.method\n\nThe method.\n\n"
        "pkg.Outer.method.inner\n\nThe inner ? one.\n\n"
        "pkg.guarded\n\nThe guarded.\n\n"
        "pkg.guarded\n\nThe fallback.\n"
    )


def test_topics_that_are_sections_of_another_are_left_out(tmp_path: Path) -> None:
    section = "\n".join(f"A line that is long enough to tell, number {i}." for i in range(9))
    (tmp_path / "pydoc_data").mkdir()
    topics = {"if": f"The if\n***\n{section}", "compound": f"All\n===\n{section}\nMore.", "x": "y"}
    (tmp_path / "pydoc_data/topics.py").write_text(f"# generated\ntopics = {topics!r}\n")
    assert sorted(corpus_module.help_topics(tmp_path)) == ["compound", "x"]
