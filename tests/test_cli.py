"""The command line as a newcomer meets it: help, errors, each command (training: end_to_end)."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_infoentropy import __main__, __version__
from megatron_infoentropy.cli import main
from megatron_infoentropy.runtime.device import CPU_ENVIRONMENT

RECIPE = Path(__file__).parents[1] / "examples" / "tiny.yaml"


def run(*words, cwd=None):
    """As a user runs it: a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "megatron_infoentropy", *map(str, words)],
        cwd=cwd,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture
def call(capsys, monkeypatch, tmp_path):
    """The same in this process, in an empty folder, which starts at once."""

    def call(*words):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["infoentropy", *map(str, words)])
        with pytest.raises(SystemExit) as end:
            main()
        captured = capsys.readouterr()
        return subprocess.CompletedProcess(words, end.value.code, captured.out, captured.err)

    return call


def test_help_lists_every_command():
    done = run("--help")
    assert done.returncode == 0
    listed = re.findall(r"^  ([a-z][a-z-]+)  ", done.stdout, flags=re.M)
    assert sorted(listed) == sorted(__main__.EXTRA_OF)


@pytest.mark.parametrize("command", __main__.EXTRA_OF)
def test_help_of_a_command_says_what_it_does_and_explains_every_option(call, command):
    done = call(command, "--help")
    assert done.returncode == 0
    about, _, options = done.stdout.partition("Options:")
    assert re.search(r"\n\n  [A-Z][^.]+\.", about), "a sentence behind the usage"
    options = options.splitlines()
    starts = [line for line in options if re.match(r"  (-|\*)", line)]
    for line in starts:
        words = re.split(r"\s{2,}", line.strip())
        following = options[options.index(line) + 1 :][:1]
        assert len(words) > 1 or (following and following[0].startswith("   ")), line


def test_the_version_is_the_packages(call):
    assert call("--version").stdout.strip() == __version__


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("preprocess --input no.jsonl --tokenizer t --output o", "no.jsonl"),
        ("convert nowhere --tokenizer t --output o", "nowhere"),
        ("report nowhere --output o.html", "nowhere"),
        ("evaluate m --data d --token-counts c --output o", "expected"),
        ("train no.yaml --data d --tokenizer t --run r", "no recipe at no.yaml"),
        (f"train {RECIPE} --data d --tokenizer t --run r --sigma -1", "sigma must be at least 0"),
        (f"train {RECIPE} --data nowhere --tokenizer t --run r", "nowhere"),
        ("bench --dtype int8", "dtype must be float32 or bfloat16"),
        ("bench --tokens 0", "must be positive"),
        ("bench --vocabulary 65 --tensor-parallel 2", "does not split evenly over 2 ranks"),
        ("bench --grid huge", "grid must be one of small, headline, full, tiny"),
        ("tokenizer no.jsonl --output t", "no.jsonl"),
    ],
)
def test_a_mistake_is_one_sentence_and_exit_code_1(call, tmp_path, words, message):
    done = call(*words.split())
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("infoentropy: ")
    assert message in last
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_bench_prints_ratios(call):
    done = call("bench", "--tokens", 64, "--vocabulary", 1000, "--repeats", 1, "--no-compiled")
    assert done.returncode == 0, done.stderr
    for provider in ("native in place", "reference", "torch", "megatron unfused", "paper eager"):
        assert re.search(rf"^ *{provider}  .* \d+\.\d\d ", done.stdout, flags=re.M), provider
    assert "of copy" in done.stdout
    assert "not measured: torch compiled" in done.stdout


def test_a_mistake_looks_the_same_to_the_shell(tmp_path):
    done = run("report", "nowhere", "--output", "o.html", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("infoentropy: ")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("command", ["evaluate", "tasks", "convert"])
def test_models_are_asked_by_a_process_that_keeps_memory(monkeypatch, command):
    started = []
    monkeypatch.setenv("GLIBC_TUNABLES", "")  # so that it is put back behind the test
    monkeypatch.delenv("GLIBC_TUNABLES")
    monkeypatch.setattr(sys, "argv", ["infoentropy", command, "--help"])
    monkeypatch.setattr(sys, "orig_argv", ["python", "-m", "megatron_infoentropy", command])
    monkeypatch.setattr("os.execv", lambda *call: started.append((*call, os.environ.copy())))
    for _ in range(2):  # the second time as the process that was started
        with pytest.raises(SystemExit):
            __main__.main()
    if command == "convert":
        assert not started
    else:
        ((program, words, environment),) = started
        assert words == [program, "-m", "megatron_infoentropy", command]
        assert environment["GLIBC_TUNABLES"] == CPU_ENVIRONMENT["GLIBC_TUNABLES"]
