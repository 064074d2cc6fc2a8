"""Memory of an evaluation: as declared in docs/evaluate.md, however many tokens there are."""

import json
import subprocess
import sys
from pathlib import Path

MIB = 2**20
MEASURE = """
import json, os, resource, sys
from pathlib import Path
import numpy as np
import token_folder

def status(name):
    return int(Path("/proc/self/status").read_text().partition(name + ":")[2].split()[0]) * 1024

def allow(more):
    limit = status("VmPeak") + more
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.getrlimit(resource.RLIMIT_AS)[1]))

def prepare(folder, vocab_size, hidden, sizes):
    '''A model, and data of so many documents.'''
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM
    torch.set_num_threads(1)
    tokenizer = json.loads(token_folder.TOKENIZER)
    words = {f"w{i}": i for i in range(1, vocab_size)}
    tokenizer["model"]["vocab"] = {"<|endoftext|>": 0} | words
    token_folder.TOKENIZER, token_folder.VOCAB = json.dumps(tokenizer).encode(), vocab_size
    config = LlamaConfig(
        vocab_size=vocab_size, hidden_size=hidden, intermediate_size=hidden, num_hidden_layers=1,
        num_attention_heads=1, max_position_embeddings=256)
    LlamaForCausalLM(config).save_pretrained(folder)
    (folder / "tokenizer.json").write_bytes(token_folder.TOKENIZER)
    for documents in sizes:
        ids = np.random.default_rng(0).integers(1, vocab_size, (documents, 2000))
        token_folder.write_token_folder(folder / str(documents), {"A": list(ids)})

def evaluate(model, documents):
    from megatron_infoentropy.evaluate.perplexity import evaluate_model
    data = model / str(documents)
    evaluate_model(model, data, token_counts=data / "token_counts.npy", output=data / "run")
    return status("VmHWM")

root = Path(sys.argv[1])
child = os.fork()
if not child:  # what this takes is not measured
    prepare(root / "small", 61, 8, (60, 480))
    prepare(root / "wide", 12000, 32, (8,))
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
one = evaluate(root / "small", 60)
allow(64 * 2**20)
eight = evaluate(root / "small", 480)
allow(4096 * 12000 * 4 + 160 * 2**20)
wide = evaluate(root / "wide", 8)
sys.stdout.write(json.dumps([one, eight, wide]))
"""


def test_eight_times_the_data_take_no_more_and_logits_are_held_once(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path)],
        capture_output=True,
        text=True,
        env={"PYTHONPATH": str(Path(__file__).parent), "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    one, eight, wide = json.loads(done.stdout)
    assert eight - one < 10 * MIB
    parameters, logits, activations = 2 * 12000 * 32, 4096 * 12000 * 4, 64 * 4096 * 32
    assert wide - eight < 4 * parameters + logits + activations + 32 * MIB
    assert wide - eight > logits / 2  # it did measure a batch
    assert eight < 0.9e9 + 60 * 16 * 4096 + 900 * 480
