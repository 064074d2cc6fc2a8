"""Folders of every family, read by the last transformers 4, which is installed for it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_checkpoint import FAMILIES, write_tiny
from tiny_tokenizer import write_gpt2_tokenizer

from megatron_infoentropy.convert import convert_checkpoint

# What else 4.57 needs is there already; it does not start with newer ones of these two.
PINS = ("transformers==4.57.6", "tokenizers==0.22.2", "huggingface-hub==0.36.2")
CASES = {
    **FAMILIES,
    "tied": {"untie_embeddings_and_output_weights": False},
    "llama3": {"use_rope_scaling": True},
    "llama with biases": FAMILIES["qwen2"],
}
PROGRAM = """
import sys
from pathlib import Path
import transformers
from megatron_infoentropy.convert import prove
assert transformers.__version__ == "4.57.6", transformers.__version__
for case in sys.argv[2:]:
    folder = Path(sys.argv[1]) / case
    print(case, prove(folder / "save", folder / "hf"))
"""


@pytest.mark.slow
def test_transformers_4_computes_the_same_and_cuts_text_the_same(tmp_path: Path) -> None:
    installed = subprocess.run(
        [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", "four", *PINS],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    if installed.returncode:
        pytest.skip(f"transformers 4 cannot be installed: {installed.stderr[-300:]}")
    tokenizer = write_gpt2_tokenizer(tmp_path / "tokenizer")
    for case, changes in CASES.items():
        # No defaults: transformers 4 has 10000 and 0.25 where it does not find what it reads.
        write_tiny(
            tmp_path / case / "save",
            **{"vocab_size": 258, "padded_vocab_size": 384, "rotary_base": 500000} | changes,
        )
        convert_checkpoint(
            tmp_path / case / "save",
            tmp_path / case / "hf",
            tokenizer=tokenizer,
            family="qwen2" if case == "qwen2" else "auto",
        )
    paths = [str(tmp_path / "four"), str(Path(__file__).parents[2])]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PROGRAM, str(tmp_path), *CASES],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("same top token 100.00%") == len(CASES)
