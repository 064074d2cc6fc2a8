"""A tiny data set, ranks that start fast, and network namespaces that act as hosts."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import fake_slurm
import pytest
from cluster_runs import kill_all_on
from namespaces import SSH, hosts, why_not

HERE = Path(__file__).parent


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


@pytest.fixture(scope="module")
def programs(quick_ranks, tmp_path_factory):
    """A folder on PATH that holds the stand-ins for Slurm and ssh; ranks start fast meanwhile."""
    folder = tmp_path_factory.mktemp("programs")
    fake_slurm.install(folder)
    (folder / "ssh").write_text(SSH)
    (folder / "ssh").chmod(0o755)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**quick_ranks, "PATH": f"{folder}:{os.environ['PATH']}"}.items():
            patch.setenv(name, value)
        yield folder


@pytest.fixture(scope="module")
def two_hosts(programs):
    """Two namespaces, which the ssh on PATH enters meanwhile; none where they cannot be made."""
    if why_not():
        yield []
        return
    with hosts(2) as found, pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOSTS", " ".join(f"{host.address}={host.name}" for host in found))
        try:
            yield found
        finally:
            kill_all_on(found)
