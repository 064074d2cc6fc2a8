"""What a newcomer sees of the data commands: sentences, and a cure in each error."""

import json
import os
import subprocess
import sys

import pytest
from text_files import line, write
from typer.testing import CliRunner, Result

from megatron_infoentropy.cli import app
from megatron_infoentropy.data.manifest import load_manifest


def command(*words: object) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words])


@pytest.fixture
def plain(tmp_path):
    lines = [json.dumps({"text": f"plain {number}"}) for number in range(20)]
    return write(tmp_path / "plain.jsonl", lines)


def test_plain_lines_become_one_dataset_and_the_screen_says_so(plain, tokenizer_folder, tmp_path):
    asked = ("preprocess", "--input", plain, "--tokenizer", tokenizer_folder, "--output")
    done = command(*asked, tmp_path / "out")
    assert done.exit_code == 0, done.output
    assert "the first documents name no domain (at meta.pile_set_name)" in done.stderr
    assert "--split-by" in done.stderr
    quiet = command(*asked, tmp_path / "quiet", "--split-by", "")
    assert quiet.exit_code == 0
    assert "domain" not in quiet.stderr
    refused = command(*asked, tmp_path / "no", "--split-by", "meta.pile_set_name")
    assert "--split-by ''" in str(refused.exception)


def test_a_blend_names_its_cure_and_takes_no_negative_run(plain, tokenizer_folder, tmp_path):
    out = tmp_path / "out"
    command("preprocess", "--input", plain, "--tokenizer", tokenizer_folder, "--output", out)
    assert "greater than or equal to 1" in command("blend", out, "--tokens", -5).output
    assert "a number of tokens, got inf" in str(command("blend", out, "--tokens", "inf").exception)
    refused = str(command("blend", out, "--weights", "paper").exception)
    assert "do not name the domain 'all'" in refused
    assert "natural, temperature:T or a .json file" in refused
    assert "data-weights" in refused


def test_mistakes_at_the_keyboard_end_with_what_to_do(plain, tokenizer_folder, tmp_path):
    out, made = tmp_path / "out", ("--tokenizer", tokenizer_folder, "--output", tmp_path / "out")
    assert command("preprocess", "--input", plain, *made).exit_code == 0
    for words, cure in (
        (("preprocess", "--input", plain, *made, "--no-append-eod"), "give --overwrite"),
        (("preprocess", "--input", tmp_path, *made), "is a folder; name the files in it"),
        (("preprocess", "--input", plain, "--tokenizer", "gpt2", "--output", out), "tokenizer`"),
        (("inspect", out / "all.bin"), "without either"),
    ):
        assert cure in str(command(*words).exception), words
    assert "greater than or equal" in command("corpus", tmp_path / "c", "--megabytes", -5).output


def test_a_damaged_dataset_is_named_once_and_its_cure_given(plain, tokenizer_folder, tmp_path):
    out = tmp_path / "out"
    command("preprocess", "--input", plain, "--tokenizer", tokenizer_folder, "--output", out)
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
    path = write(tmp_path / "a.jsonl", [line("words", name) for name in names] + ["{}"])
    out = tmp_path / "data[/v2]"
    made = command(
        *("preprocess", "--input", path, "--tokenizer", tokenizer_folder, "--output", out),
        *("--on-error", "skip"),
    )
    assert made.exit_code == 0, made.output
    assert f"{out}/rejected.tsv" in made.stdout
    assert all(name in made.stdout for name in names)
    for words in (("blend", out), ("pack", out, "--output", tmp_path / "[/p]", "--length", 1)):
        made = command(*words)
        assert made.exit_code == 0, made.output
        assert all(name in made.output for name in names)
    assert command("verify", out).stdout == f"{out}: ok\n"


def test_a_pattern_that_is_a_file_s_name_is_that_file(tokenizer_folder, tmp_path):
    paths = [write(tmp_path / name, [line(name)]) for name in ("data[1].jsonl", "data1.jsonl")]
    for given, taken in ((paths[0], paths[0]), (tmp_path / "data[0-9].jsonl", paths[1])):
        out = tmp_path / taken.stem
        made = command(
            "preprocess", "--input", given, "--tokenizer", tokenizer_folder, "--output", out
        )
        assert made.exit_code == 0, made.output
        assert [facts.name for facts in load_manifest(out).inputs] == [taken.name]
        assert command("verify", out, "--inputs", given).exit_code == 0
    wrong = command("verify", out, "--inputs", paths[0])
    assert f"{paths[0]}: is not what the dataset was made of" in wrong.stdout
    assert wrong.exit_code == 1
