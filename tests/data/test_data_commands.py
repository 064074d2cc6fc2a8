"""What a newcomer sees of the data commands: sentences, and a cure in each error."""

import json
import os
import subprocess
import sys

import pytest
from text_files import command, line, write


@pytest.fixture
def words(tokenizer_folder, tmp_path):
    """Of a command that makes a dataset of lines that name no domain."""
    lines = [json.dumps({"text": f"plain {number}"}) for number in range(20)]
    path = write(tmp_path / "plain.jsonl", lines)
    return ("preprocess", "--input", path, "--tokenizer", tokenizer_folder, "--output")


def test_mistakes_at_the_keyboard_end_with_what_to_do(words, tmp_path):
    out = tmp_path / "out"
    made = command(*words, out)
    assert [row.split()[1] for row in made.stdout.splitlines() if " 20 " in row] == ["all"]
    for mistake, cure in (
        ((*words, tmp_path / "no", "--split-by", "meta.pile_set_name"), "--split-by ''"),
        ((*words, out, "--no-append-eod"), "give --overwrite"),
        ((*words, out, "--input", tmp_path), "is a folder; name the files in it"),
        ((*words, out, "--tokenizer", "gpt2"), "tokenizer`"),
        (("inspect", out / "all.bin"), "without either"),
        (("blend", out, "--tokens", "inf"), "a number of tokens, got inf"),
        (("blend", out, "--weights", "paper"), "do not name the domain 'all'"),
        (("blend", out, "--weights", "paper"), "natural, temperature:T or a .json file"),
        (("blend", out, "--weights", "paper"), "data-weights"),
    ):
        assert cure in str(command(*mistake).exception), mistake
    for mistake in (("corpus", tmp_path / "c", "--megabytes", -5), ("blend", out, "--tokens", -5)):
        assert "greater than or equal" in command(*mistake).output


def test_a_damaged_dataset_is_named_once_and_its_cure_given(words, tmp_path):
    out = tmp_path / "out"
    command(*words, out)
    (out / "all.idx").unlink()
    found = command("verify", out)
    assert found.stdout.splitlines() == [f"{out}/all.idx: is missing"]
    assert "delete it and make it again (`infoentropy preprocess`" in str(found.exception)


def test_text_is_utf8_whatever_the_locale(tokenizer_folder, tmp_path):
    """Nor what the terminal takes."""
    ascii_locale = {"LC_ALL": "POSIX", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    ascii_terminal = {"PYTHONIOENCODING": "ascii"}
    bpe = tmp_path / "Wörter"
    bpe.mkdir()
    for path in tokenizer_folder.iterdir():
        text = path.read_text(encoding="utf-8").replace("<|endoftext|>", "<|end▁of▁text|>")
        (bpe / path.name).write_text(text, encoding="utf-8")
    write(tmp_path / "é.jsonl", [line("猫", "dépôt 中")])
    (tmp_path / "weights.json").write_text('{"dépôt 中": 1}', encoding="utf-8")
    program = """
import sys
from megatron_infoentropy.cli import main
for words in sys.argv[1:]:
    sys.argv[1:] = words.split()
    try:
        main()
    except SystemExit as done:
        assert not done.code
"""
    commands = (
        "preprocess --input é.jsonl --tokenizer Wörter --output out",
        "blend out --weights weights.json --output blend.txt",
        "inspect out --tokenizer Wörter",
    )
    done = subprocess.run(
        [sys.executable, "-c", program, *commands],
        cwd=tmp_path,
        env={**os.environ, **ascii_locale, **ascii_terminal},
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr.decode()
    assert "猫" in done.stdout.decode() or "\\u732b" in done.stdout.decode()
    assert (tmp_path / "blend.txt").read_text(encoding="utf-8") == f"1.0 {tmp_path}/out/dépôt_中\n"


def test_names_in_brackets_and_long_ones_are_shown_as_they_are(tokenizer_folder, tmp_path):
    names = ["[arxiv]", "[/web]", "[bold]books", "[longer]" * 12]
    path = write(tmp_path / "a[0].jsonl", [line("words", name) for name in names] + ["{}"])
    out, made_of = tmp_path / "data[/v2]", ("--input", path, "--tokenizer", tokenizer_folder)
    made = command("preprocess", *made_of, "--output", out, "--on-error", "skip")
    assert made.exit_code == 0, made.output
    assert f"{out}/rejected.tsv" in made.stdout
    assert all(name in made.stdout for name in names)
    for words in (("blend", out), ("pack", out, "--output", tmp_path / "[/p]", "--length", 1)):
        made = command(*words)
        assert made.exit_code == 0, made.output
        assert all(name in made.output for name in names)
    assert command("verify", out, "--inputs", path).stdout == f"{out}: ok\n"
    path.write_text("other")
    wrong = command("verify", out, "--inputs", path)
    assert f"{path}: is not what the dataset was made of" in wrong.stdout
    assert wrong.exit_code == 1
