"""A folder of tasks on local files, and a tiny model to answer them."""

import json
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from megatron_infoentropy.data.tokenizer import train_tokenizer

COLOURS = ("red", "green", "blue")
CHOICE = """\
task: {name}
dataset_path: json
dataset_kwargs:
  data_files: {{test: {file}}}
output_type: multiple_choice
test_split: test
fewshot_split: test
doc_to_text: "Q: {{{{question}}}}\\nA:"
doc_to_choice: [red, green, blue]
doc_to_target: answer
metric_list:
  - metric: acc
  - metric: acc_norm
"""
ROLLING = """\
task: prose
dataset_path: json
dataset_kwargs:
  data_files: {test: prose.jsonl}
output_type: loglikelihood_rolling
test_split: test
doc_to_text: ""
doc_to_target: question
metric_list:
  - metric: bits_per_byte
"""
WRITTEN = """\
task: written
dataset_path: json
dataset_kwargs:
  data_files: {test: colours.jsonl}
output_type: generate_until
generation_kwargs: {until: ["\\n"], max_gen_toks: 3}
test_split: test
doc_to_text: "Q: {{question}}\\nA:"
doc_to_target: "{{['gr\u00fcn', 'verde']}}"
metric_list:
  - metric: exact_match
"""
# The choices stand in the prompt, and one continuation follows each.
BLANKS = """\
task: blanks
dataset_path: json
dataset_kwargs:
  data_files: {test: colours.jsonl}
output_type: multiple_choice
test_split: test
doc_to_text: answer
doc_to_choice: "{{['Red', 'Green', 'Blue']}}"
doc_to_target: "{{question}}"
metric_list:
  - metric: acc
"""
GROUP = """\
group: both
task: [colours, again]
aggregate_metric_list:
  - metric: acc
"""


def write_tasks(folder: Path) -> Path:
    """Tasks colours, again (the same), prose, written and blanks; the group both of the first two;
    and one without its file, gone."""
    folder.mkdir()
    rows = [{"question": f"What is number {i}?", "answer": i % 3} for i in range(12)]
    for file in ("colours", "prose"):
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{file}.jsonl").write_text(text)
    files = {"colours": "colours.jsonl", "again": "colours.jsonl", "gone": "gone.jsonl"}
    for name, file in files.items():
        (folder / f"{name}.yaml").write_text(CHOICE.format(name=name, file=file))
    others = {"prose": ROLLING, "written": WRITTEN, "blanks": BLANKS, "both": GROUP}
    for name, description in others.items():
        (folder / f"{name}.yaml").write_text(description, encoding="utf-8")
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
