"""The tutorials of the documentation, command by command, as a reader gives them."""

import contextlib
import io
import json
import re
import shlex
from pathlib import Path

import plain_run
import pytest
import torch
from launch import run_trainer
from run_command import infoentropy
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_infoentropy.evaluate.runlog import parse_log
from megatron_infoentropy.launch.job import TrainingJob
from megatron_infoentropy.launch.train import build_command

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
    if words[:2] == ["train", "examples/tiny.yaml"] and "--dry-run" not in words:
        words = [*words, *SMALLER]
    if words[0] == "corpus":
        words = [*words[: words.index("--megabytes") + 1], "0.3"]
    return infoentropy(*words, cwd=folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, ranks_start_fast):
    """A reader's folder after the first four tutorials, and what each command printed."""
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


def python(code: str, folder: Path) -> str:
    """What a block of Python prints, run in this folder."""
    with contextlib.chdir(folder), contextlib.redirect_stdout(io.StringIO()) as said:
        exec(compile(code, "tutorial", "exec"), {})
    return said.getvalue()


def test_the_exported_model_writes_text(folder):
    (code,) = blocks("convert", "python")
    assert python(code, folder[0]).startswith("The module")


def cross_entropy_of_answers(hf: Path, conversations: Path) -> float:
    """By transformers, as its users fine-tune: labels of -100 for what is not an answer."""
    tokenizer = AutoTokenizer.from_pretrained(hf)
    model = AutoModelForCausalLM.from_pretrained(hf).eval()
    total, count = 0.0, 0
    for line in conversations.read_text().splitlines():
        messages = json.loads(line)["messages"]
        prompt, whole = (
            tokenizer.apply_chat_template(
                part, tokenize=True, add_generation_prompt=len(part) == 1, return_dict=False
            )
            for part in (messages[:1], messages)
        )
        labels = [-100] * len(prompt) + whole[len(prompt) :]
        with torch.no_grad():
            loss = model(input_ids=torch.tensor([whole]), labels=torch.tensor([labels])).loss
        tokens = len(whole) - len(prompt)
        total, count = total + loss.item() * tokens, count + tokens
    return total / count


def test_a_model_is_taught_to_answer(folder, tmp_path):
    """From a model of nothing, to its loss, to a training, to an export that answers."""
    folder, _ = folder
    for code in blocks("fine_tune", "python")[:2]:
        python(code, folder)
    importing, training, exporting = commands("fine_tune")
    run(importing, folder)
    hf, conversations = folder / "runs/infoentropy/hf", folder / "chats/validation.jsonl"
    expected = cross_entropy_of_answers(hf, conversations)
    extra = [*training[training.index("--") + 1 :], "--skip-train", "--no-load-optim"]
    extra[extra.index("chat")] = str(folder / "chat")  # ranks that are forked start elsewhere
    places = (folder / training[1], folder / "chats", hf, folder / "runs/before")
    flags = build_command(TrainingJob(*places, extra_flags=tuple(extra))).words
    flags = flags[flags.index("megatron_infoentropy.pretrain") + 1 :]
    log = parse_log(run_trainer(1, plain_run.main, (), flags, tmp_path).splitlines())
    assert log.validation[0]["cross entropy"] == pytest.approx(expected, abs=1e-4)

    said = run(training, folder)
    log = parse_log((folder / "runs/chat/train.log").read_text().splitlines())
    assert log.training[1]["cross entropy"] == pytest.approx(expected, abs=1e-4)
    assert "trained to step 60" in said
    run(exporting, folder)
    ask = blocks("fine_tune", "python")[2]
    for line in conversations.read_text().splitlines():
        question, answer = (message["content"] for message in json.loads(line)["messages"])
        assert python(ask.replace("Capital of France?", question), folder) == f"{answer}\n"
