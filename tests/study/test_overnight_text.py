"""The text of the overnight study: a corpus, and files of prose cut into documents and splits."""

import gzip
import json
import subprocess
import sys

import pytest
import zstandard

SPLITS = ("train", "validation", "test")


def lines_of(path) -> list[dict]:
    with path.open("rb") as file:
        text = zstandard.ZstdDecompressor().stream_reader(file).read().decode()
    return [json.loads(line) for line in text.split("\n")[:-1]]


@pytest.fixture
def make(tmp_path, pytestconfig):
    (tmp_path / "corpus").mkdir()
    for split in SPLITS:
        line = json.dumps({"text": f"of {split}\u2028", "meta": {"pile_set_name": "Python docs"}})
        data = zstandard.ZstdCompressor().compress(f"{line}\n".encode())
        (tmp_path / "corpus" / f"{split}.jsonl.zst").write_bytes(data)
    script = pytestconfig.rootpath / "examples" / "studies" / "overnight_text.py"

    def run(*words: object) -> subprocess.CompletedProcess[str]:
        given = ["--corpus", tmp_path / "corpus", "--output", tmp_path / "made", *words]
        words = [sys.executable, script, *given]
        return subprocess.run(list(map(str, words)), capture_output=True, text=True)

    return run


def test_every_paragraph_is_in_one_split_once_and_the_corpus_stays(make, tmp_path):
    paragraphs = [f"Paragraph {number}: " + "word " * 400 for number in range(8000)]
    (tmp_path / "book.gz").write_bytes(gzip.compress("\n\n".join(paragraphs[:4000]).encode()))
    (tmp_path / "notes").write_text("\n\n".join(paragraphs[4000:]))
    (tmp_path / "link").symlink_to(tmp_path / "notes")
    (tmp_path / "index").write_bytes(b"\0\1\2")
    names = [tmp_path / name for name in ("book.gz", "notes", "link", "index")]
    done = make("--domain", "prose", *names)
    assert done.returncode == 0, done.stderr
    made = {split: lines_of(tmp_path / "made" / f"{split}.jsonl.zst") for split in SPLITS}
    assert {split: lines[0]["text"] for split, lines in made.items()} == {
        split: f"of {split}\u2028" for split in SPLITS
    }
    texts = {split: [line["text"] for line in lines[1:]] for split, lines in made.items()}
    every = [part for split in SPLITS for text in texts[split] for part in text.split("\n\n")]
    assert sorted(every) == sorted(paragraphs)
    assert all(4000 <= len(text) < 8000 for split in SPLITS for text in texts[split][:-1])
    held_out = len(texts["validation"]) + len(texts["test"])
    assert 0.01 < held_out / sum(map(len, texts.values())) < 0.1
    assert {line["meta"]["pile_set_name"] for line in made["train"][1:]} == {"prose"}


def test_too_little_text_is_refused_and_nothing_is_written(make, tmp_path):
    (tmp_path / "short").write_text("A line.")
    done = make("--domain", "prose", tmp_path / "short")
    assert done.returncode == 2
    assert "--domain prose: too little text for three splits" in done.stderr
    assert not (tmp_path / "made").exists()
