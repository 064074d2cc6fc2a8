"""With torch and numpy alone the loss trains, and every command says which extra it needs."""

import os
import re
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from megatron_infoentropy.__main__ import EXTRA_OF
from megatron_infoentropy.cli import app

ROOT = Path(__file__).parent.parent
THREE_STEPS = """
import importlib.util, sys

import torch
from megatron_infoentropy import InfoEntropyConfig, infoentropy_loss, linear_infoentropy_loss

infoentropy_loss(torch.zeros(2, 3), torch.tensor([0, 1]))
assert "triton" not in sys.modules, "choosing a backend imports no other"
torch.manual_seed(0)
embedding, output = torch.nn.Embedding(50, 16), torch.nn.Linear(16, 50, bias=False)
optimizer = torch.optim.SGD([*embedding.parameters(), *output.parameters()], lr=1.0)
tokens = torch.arange(40) % 50
losses = []
for step in range(3):
    hidden = embedding(tokens)
    loss = infoentropy_loss(output(hidden), tokens, config=InfoEntropyConfig(gamma=1.0))
    fused = linear_infoentropy_loss(hidden, output.weight, tokens)
    torch.testing.assert_close(loss, fused)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
assert losses[0] > losses[1] > losses[2], losses
for package in ("typer", "megatron", "transformers", "yaml"):
    assert importlib.util.find_spec(package) is None, "this is no lean installation"
"""


def with_dependencies(names: list[str]) -> set[str]:
    """Return these installed distributions and all that they need, without any extra."""
    needed: set[str] = set()
    while names:
        name = names.pop()
        if name in needed:
            continue
        try:
            requirements = map(Requirement, metadata.requires(name) or [])
        except metadata.PackageNotFoundError:  # a marker of another platform
            continue
        needed.add(name)
        names += [
            r.name for r in requirements if r.marker is None or r.marker.evaluate({"extra": ""})
        ]
    return needed


def environment(site: Path, requirements: list[str]):
    """Return a function that runs code where these packages are installed, and no others.

    They are links to what this environment has of them.
    """
    for name in with_dependencies([Requirement(line).name for line in requirements]):
        root = Path(str(metadata.distribution(name).locate_file("")))
        for top in {path.parts[0] for path in metadata.files(name) or ()} - {"..", "__pycache__"}:
            if not (site / top).exists():
                (site / top).symlink_to(root / top)
    (site / "megatron_infoentropy").symlink_to(ROOT / "megatron_infoentropy")
    here = {"cwd": site, "env": os.environ | {"PYTHONPATH": str(site)}}
    # -S: without this environment's own packages.
    return lambda *words: subprocess.run(
        [sys.executable, "-S", "-c", *words], **here, capture_output=True, text=True, check=False
    )


PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]


@pytest.fixture(scope="module")
def lean(tmp_path_factory):
    return environment(tmp_path_factory.mktemp("lean"), PROJECT["dependencies"])


@pytest.fixture(scope="module")
def with_cli(tmp_path_factory):
    return environment(tmp_path_factory.mktemp("cli"), PROJECT["dependencies"] + EXTRAS["cli"])


def test_three_steps_train_with_torch_and_numpy_alone(lean):
    done = lean(THREE_STEPS)
    assert done.returncode == 0, done.stderr


COMMAND = "from megatron_infoentropy.__main__ import main; main()"


@pytest.mark.parametrize("command", [*EXTRA_OF, "--help"])
def test_every_command_says_which_extra_it_lacks(lean, command):
    done = lean(COMMAND, command)
    extra = EXTRA_OF.get(command, "all")
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert re.match(
        r"infoentropy: (infoentropy [a-z-]+|the command infoentropy) needs the package typer, "
        rf"which is not installed: pip install 'megatron-infoentropy\[{extra}\]'\n",
        done.stderr,
    )


def test_every_command_has_an_extra_that_there_is():
    names = {
        command.name or command.callback.__name__.replace("_", "-")
        for command in app.registered_commands
    }
    assert set(EXTRA_OF) == names
    assert set(EXTRA_OF.values()) <= set(EXTRAS)


@pytest.mark.parametrize(
    ("words", "package"),
    [
        (("corpus", "corpus"), "zstandard"),
        (("tokenizer", "a.jsonl", "--output", "bpe"), "tokenizers"),
        (("train", str(ROOT / "examples" / "tiny.yaml"), "--dry-run"), "tokenizers"),
        (("study", "a.yaml", "--output", "study"), "yaml"),
    ],
)
def test_a_command_that_starts_names_the_extra_of_what_it_lacks_later(with_cli, words, package):
    done = with_cli(COMMAND, *words)
    assert done.returncode == 1
    assert done.stderr == (
        f"infoentropy: infoentropy {words[0]} needs the package {package}, which is not installed: "
        f"pip install 'megatron-infoentropy[{EXTRA_OF[words[0]]}]'\n"
    )
