"""A folder of tasks on local files, and a tiny model to answer them."""

import json
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from megatron_infoentropy.data.tokenizer import train_tokenizer

COLOURS = ("red", "green", "blue")
ACC = [{"metric": "acc"}]
PROMPT = "Q: {{question}}\nA:"
CHOICE = {
    "output_type": "multiple_choice",
    "fewshot_split": "test",
    "doc_to_text": PROMPT,
    "doc_to_choice": list(COLOURS),
    "doc_to_target": "answer",
    "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
}
TASKS = {
    "colours": CHOICE,
    "again": CHOICE,
    "gone": CHOICE,  # its file is not there
    "prose": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "question",
        "metric_list": [{"metric": "bits_per_byte"}],
    },
    "written": {
        "output_type": "generate_until",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 3},
        "doc_to_text": PROMPT,
        "doc_to_target": "{{['gr\u00fcn', 'verde']}}",
        "metric_list": [{"metric": "exact_match"}],
    },
    # The choices stand in the prompt, and one continuation follows each.
    "blanks": {
        "output_type": "multiple_choice",
        "doc_to_text": "answer",
        "doc_to_choice": "{{['Red', 'Green', 'Blue']}}",
        "doc_to_target": "{{question}}",
        "metric_list": ACC,
    },
}


def write_tasks(folder: Path) -> Path:
    """Tasks of twelve items, in JSON, which is YAML; and `both`, the group of the first two."""
    folder.mkdir()
    rows = [{"question": f"What is number {i}?", "answer": i % 3} for i in range(12)]
    (folder / "colours.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    group = {"group": "both", "task": ["colours", "again"], "aggregate_metric_list": ACC}
    (folder / "both.yaml").write_text(json.dumps(group))
    for name, description in TASKS.items():
        file = "gone.jsonl" if name == "gone" else "colours.jsonl"
        where = {"dataset_kwargs": {"data_files": {"test": file}}, "test_split": "test"}
        content = {"task": name, "dataset_path": "json"} | where | description
        (folder / f"{name}.yaml").write_text(json.dumps(content))
    return folder


def write_answering_model(folder: Path, text: Path) -> Path:
    """A random Llama with a tokenizer trained on `text`."""
    size = train_tokenizer(text, folder, vocab_size=262).vocab_size
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=size,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=128,
        initializer_range=0.3,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder
