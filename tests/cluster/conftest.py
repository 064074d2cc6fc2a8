"""A tiny data set, ranks that start fast, and network namespaces that act as hosts."""

import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_infoentropy.launch.job import TrainingJob
from megatron_infoentropy.launch.start import prepare, write

HERE = Path(__file__).parent
RECIPE = HERE.parents[1] / "examples" / "tiny.yaml"
SMALL = [
    *("--num-layers", "2", "--hidden-size", "32", "--ffn-hidden-size", "64"),
    *("--seq-length", "32", "--max-position-embeddings", "32", "--micro-batch-size", "4"),
    *("--global-batch-size", "8", "--eval-iters", "1", "--eval-interval", "100000"),
    *("--init-method-std", "0.1", "--lr-warmup-iters", "2"),
]


@pytest.fixture(scope="session")
def tokens(tmp_path_factory):
    """data/{train,validation,test} and a tokenizer, of a few help texts of Python's."""
    import json
    import pydoc_data.topics

    from megatron_infoentropy.data.preprocess import preprocess
    from megatron_infoentropy.data.tokenizer import train_tokenizer

    folder = tmp_path_factory.mktemp("tokens")
    topics = sorted(pydoc_data.topics.topics.items())[:30]
    lines = [
        json.dumps({"text": text, "meta": {"pile_set_name": "AB"[i % 2]}})
        for i, (_, text) in enumerate(topics)
    ]
    corpus = folder / "text.jsonl"
    corpus.write_text("\n".join(lines) + "\n")
    train_tokenizer(corpus, folder / "tokenizer", vocab_size=500)
    preprocess([corpus], folder / "tokenizer", folder / "data" / "train")
    for split in ("validation", "test"):
        shutil.copytree(folder / "data" / "train", folder / "data" / split)
    return folder


@pytest.fixture(scope="session")
def quick_ranks(tmp_path_factory):
    """Environment variables that make torchrun's ranks forks of one process."""
    path = tmp_path_factory.mktemp("ranks") / "socket"
    environment = {
        **os.environ,
        "PYTHONPATH": str(HERE.parent / "integration"),
        "OMP_NUM_THREADS": "1",
        "TORCHDYNAMO_DISABLE": "1",
        "CUDA_DEVICE_MAX_CONNECTIONS": "1",
    }
    server = subprocess.Popen(
        [sys.executable, HERE / "quick_ranks.py", "serve", path],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    shim = path.with_name("python")
    # -S and -I: the client needs nothing but the standard library, and starts at once.
    shim.write_text(f'#!/bin/sh\nexec {sys.executable} -I -S {HERE}/quick_ranks.py "$@"\n')
    shim.chmod(0o755)
    assert server.stdout.readline() == b"ready\n", "the server of forked ranks did not start"
    yield {"QUICK_RANKS": str(path), "PYTHON_EXEC": str(shim), "OMP_NUM_THREADS": "1"}
    os.killpg(server.pid, signal.SIGKILL)
    server.wait()


def prepared(tokens, run, cluster, *extra, settings=None):
    """The scripts of a training of a tiny model, in its run folder; endless but for `extra`."""
    endless = ("--train-iters", 100000, "--lr-decay-iters", 100, "--log-interval", 1)
    settings = {"infoentropy-normalization": "global", **(settings or {})}  # the same in any layout
    job = TrainingJob(
        RECIPE,
        tokens / "data",
        tokens / "tokenizer",
        run,
        settings,
        extra_flags=(*SMALL, *map(str, (*endless, *extra))),
    )
    cluster = replace(cluster, gpus_per_node=0, python=sys.executable, max_restarts=0)
    made = prepare(job, cluster, "a test")
    write(made, overwrite=True)
    return made
