"""Memory of an evaluation: as declared in docs/evaluate.md, however many tokens there are."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
from tiny_llama import write_model
from token_folder import VOCAB, tokenizer_json, write_token_folder

MIB = 2**20
MEASURE = """
import json, resource, sys
from pathlib import Path

def status(name):
    return int(Path("/proc/self/status").read_text().partition(name + ":")[2].split()[0]) * 1024

def allow(more):
    limit = status("VmPeak") + more
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.getrlimit(resource.RLIMIT_AS)[1]))

def evaluate(model, documents):
    from megatron_infoentropy.evaluate.perplexity import evaluate_model
    data = model / str(documents)
    evaluate_model(model, data, token_counts=data / "token_counts.npy", output=data / "run")
    return status("VmHWM")

root = Path(sys.argv[1])
one = evaluate(root / "small", 60)
allow(64 * 2**20)
eight = evaluate(root / "small", 480)
allow(4096 * 12000 * 4 + 160 * 2**20)
wide = evaluate(root / "wide", 8)
sys.stdout.write(json.dumps([one, eight, wide]))
"""


def prepare(folder: Path, vocab_size: int, hidden: int, sizes: tuple[int, ...]) -> None:
    """Write a model, and data of so many documents."""
    model = {"hidden_size": hidden, "intermediate_size": hidden, "num_hidden_layers": 1}
    model |= {"num_attention_heads": 1, "max_position_embeddings": 256}
    write_model(folder, 1, vocab_size, tokenizer=tokenizer_json(vocab_size), **model)
    for documents in sizes:
        ids = np.random.default_rng(0).integers(1, vocab_size, (documents, 2000))
        write_token_folder(folder / str(documents), {"A": list(ids)}, vocab_size=vocab_size)


def test_eight_times_the_data_take_no_more_and_logits_are_held_once(tmp_path: Path) -> None:
    prepare(tmp_path / "small", VOCAB, 8, (60, 480))
    prepare(tmp_path / "wide", 12000, 32, (8,))
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path)],
        capture_output=True,
        text=True,
        env={"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    one, eight, wide = json.loads(done.stdout)
    assert eight - one < 10 * MIB
    parameters, logits, activations = 2 * 12000 * 32, 4096 * 12000 * 4, 64 * 4096 * 32
    assert wide - eight < 4 * parameters + logits + activations + 32 * MIB
    assert wide - eight > logits / 2  # it did measure a batch
    assert eight < 0.9e9 + 60 * 16 * 4096 + 900 * 480
