"""Trainings of the tests on GPUs: by torchrun with flags, and by the commands on a tiny corpus."""

import json
import os
import subprocess
import sys

from megatron_infoentropy.evaluate.runlog import read_log
from megatron_infoentropy.launch.recipe import machine_flags
from megatron_infoentropy.runtime.device import find_device

SENTENCE = "the same few words again and again, so that there is something to learn"


def train(folder, ranks, flags, recipe):
    """{iteration: numbers of the log line}; fails with what was printed."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    entry = [f"--nproc-per-node={ranks}", "-m", "megatron_infoentropy.pretrain"]
    log = folder / "train.log"
    with log.open("w") as file:
        done = subprocess.run(
            [*torchrun, *entry, *machine_flags(find_device(), recipe), *flags],
            env={**os.environ, "CUDA_DEVICE_MAX_CONNECTIONS": "1"},
            stdout=file,
            stderr=subprocess.STDOUT,
        )
    assert done.returncode == 0, log.read_text()[-5000:]
    return read_log(log).training


def infoentropy(*words, cwd):
    command = [sys.executable, "-m", "megatron_infoentropy", *map(str, words)]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


def write_tokens(folder):
    """Write the tokenizer `tok` and the datasets `tokens`, of one sentence."""
    line = json.dumps({"text": SENTENCE, "meta": {"pile_set_name": "A"}}) + "\n"
    (folder / "text.jsonl").write_text(line * 400)
    infoentropy("tokenizer", "text.jsonl", "--output", "tok", "--vocab-size", 280, cwd=folder)
    for split in ("train", "validation", "test"):
        words = ("--input", "text.jsonl", "--tokenizer", "tok", "--output", f"tokens/{split}")
        infoentropy("preprocess", *words, cwd=folder)
