"""The four tutorials of the documentation, command by command, as a reader gives them."""

import re
import shlex
from pathlib import Path

import pytest
from run_command import infoentropy

ROOT = Path(__file__).parents[2]
TUTORIALS = ("data", "train", "convert", "compare")
# The same model with fewer of everything: the commands are what is tested.
SMALLER = shlex.split(
    "--num-layers 2 --hidden-size 32 --ffn-hidden-size 64 --seq-length 64"
    " --max-position-embeddings 64 --eval-iters 1 --train-iters 4 --lr-warmup-iters 1"
)


def blocks(name: str, language: str) -> list[str]:
    page = (ROOT / "docs" / "tutorials" / f"{name}.md").read_text(encoding="utf-8")
    return re.findall(rf"```{language}\n(.*?)```", page, flags=re.S)


def commands(name: str) -> list[list[str]]:
    lines = "".join(blocks(name, "console")).splitlines()
    assert all(line.startswith("$ infoentropy ") for line in lines)
    return [shlex.split(line.removeprefix("$ infoentropy ")) for line in lines]


def run(words: list[str], folder: Path) -> str:
    """Run a command in this process (one that trains starts others), made smaller."""
    if words[0] == "train" and "--dry-run" not in words:
        words = [*words, *SMALLER]
    if words[0] == "corpus":
        words = [*words[: words.index("--megabytes") + 1], "0.3"]
    return infoentropy(*words, cwd=folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A reader's folder after all four tutorials, and what each command printed."""
    folder = tmp_path_factory.mktemp("reader")
    (folder / "examples").symlink_to(ROOT / "examples")
    said = {}
    for name in TUTORIALS:
        for words in commands(name):
            said[shlex.join(words)] = run(words, folder)
    return folder, said


def test_every_command_leaves_what_the_text_says(folder):
    folder, said = folder
    for path in (
        *("corpus/train.jsonl.zst", "corpus/validation.jsonl.zst", "corpus/test.jsonl.zst"),
        *("tokens/train/token_counts.npy", "runs/plain/run.json", "runs/infoentropy/train.log"),
        *("runs/infoentropy/hf/model.safetensors", "start/model.yaml", "report.html"),
    ):
        assert (folder / path).is_file(), path
    (trained,) = [text for words, text in said.items() if "--objective" in words]
    assert "torch.distributed.run" in trained
    (converted, _) = [text for words, text in said.items() if words.startswith("convert runs")]
    assert "same top token 100.00%" in converted
    (compared,) = [text for words, text in said.items() if words.startswith("compare")]
    assert "nats" in compared


def test_the_exported_model_writes_text(folder, capsys, monkeypatch):
    (code,) = blocks("convert", "python")
    monkeypatch.chdir(folder[0])
    exec(compile(code, "convert.md", "exec"), {})
    assert capsys.readouterr().out.startswith("The module")
