"""A Megatron checkpoint, written under any parallel layout, as a LlamaForCausalLM folder.

1. Read the index and the training arguments; make the architecture of them, or refuse.
2. Match every parameter's name, and run the layouts on tensors without numbers (device "meta"):
   this finds wrong shapes, and says how large every tensor of the new file is.
3. Only now write, parameter by parameter, into a temporary folder; rename it at the end.
"""

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from megatron_infoentropy.convert.architecture import (
    Architecture,
    UnsupportedModelError,
    architecture_of,
)
from megatron_infoentropy.convert.checkpoint import MegatronCheckpoint
from megatron_infoentropy.convert.layout import LAYOUTS
from megatron_infoentropy.convert.naming import Source, llama_names, match_names
from megatron_infoentropy.convert.tokenizer_files import (
    TokenizerFacts,
    copy_tokenizer,
    read_tokenizer,
)
from megatron_infoentropy.convert.weights_file import write_weights
from megatron_infoentropy.progress import Advance, progress

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class ConversionSummary:
    """What was written, and from what."""

    output: Path
    checkpoint: Path  # the iter_... folder
    iteration: int
    parameters: int
    dtype: str
    vocab_size: int
    padded_vocab_size: int
    tied_embeddings: bool


def convert_checkpoint(
    checkpoint: Path,
    output: Path,
    *,
    tokenizer: Path | None = None,
    dtype: Dtype = "auto",
    iteration: int | None = None,
    overwrite: bool = False,
) -> ConversionSummary:
    """Write the model of a Megatron checkpoint as a Hugging Face folder.

    Args:
        checkpoint: the folder given to `--save`, or one of its `iter_...` folders.
        output: the folder to make.
        tokenizer: a Hugging Face tokenizer folder; its files are copied, and its size is where the
            padded vocabulary is cut. Without it, that is the training argument vocab_size.
        dtype: of the exported weights; "auto" keeps that of the checkpoint.
        iteration: which iteration of a `--save` folder; by default the latest.
        overwrite: replace an existing output.

    Raises:
        UnsupportedModelError: the model is none that LlamaForCausalLM could compute.
        ValueError: no readable checkpoint, a tokenizer that does not fit it, or an existing output.
    """
    if output.exists() and not overwrite:
        raise ValueError(f"{output} exists; remove it, name another output, or allow overwriting")
    opened = MegatronCheckpoint(checkpoint, iteration)
    facts = None if tokenizer is None else read_tokenizer(tokenizer)
    model = architecture_of(opened.args, None if facts is None else facts.vocab_size)
    sources = match_names(opened.tensors, model)
    torch_dtype = _choose_dtype(dtype, opened)
    shapes = _llama_shapes(opened, sources, model)
    parameters = sum(torch.Size(shape).numel() for shape in shapes.values())
    with _new_folder(output) as folder, progress("export", parameters, "parameters") as advance:
        tensors = _llama_tensors(opened, sources, model, advance)
        write_weights(folder / "model.safetensors", shapes, torch_dtype, tensors)
        _write_json(folder / "config.json", llama_config(model, torch_dtype, facts))
        _write_json(folder / "generation_config.json", dict(facts.ids) if facts else {})
        if facts is not None:
            copy_tokenizer(facts, folder)
    return ConversionSummary(
        output=output,
        checkpoint=opened.folder,
        iteration=opened.iteration,
        parameters=parameters,
        dtype=_name(torch_dtype),
        vocab_size=model.vocab_size,
        padded_vocab_size=model.padded_vocab_size,
        tied_embeddings=model.tied_embeddings,
    )


def llama_config(
    model: Architecture, dtype: torch.dtype, tokenizer: TokenizerFacts | None
) -> dict[str, Any]:
    """Return config.json, readable by transformers 4 and 5."""
    ids = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": model.vocab_size,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.ffn_hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_heads,
        "num_key_value_heads": model.num_groups,
        "head_dim": model.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": model.max_positions,
        "initializer_range": model.initializer_range,
        "rms_norm_eps": model.norm_epsilon,
        # transformers 5 reads rope_parameters; 4 ignores it and would take its default of 10000.
        "rope_theta": model.rotary_base,
        "rope_parameters": {"rope_type": "default", "rope_theta": model.rotary_base},
        "attention_bias": False,
        "mlp_bias": False,
        "attention_dropout": 0.0,
        "tie_word_embeddings": model.tied_embeddings,
        "use_cache": True,
        "torch_dtype": _name(dtype),
        **ids,
        **(tokenizer.ids if tokenizer else {}),
    }


def _choose_dtype(dtype: Dtype, checkpoint: MegatronCheckpoint) -> torch.dtype:
    stored = {tensor.dtype for tensor in checkpoint.tensors.values()}
    if quantised := stored - set(_DTYPES.values()):
        raise UnsupportedModelError(
            f"expected parameters in fp32, bf16 or fp16, got {', '.join(map(str, quantised))}; "
            "save the model in a floating-point type without quantisation"
        )
    if dtype != "auto":
        return _DTYPES[dtype]
    return stored.pop() if len(stored) == 1 else torch.float32


def _llama_tensors(
    checkpoint: MegatronCheckpoint, sources: list[Source], model: Architecture, advance: Advance
) -> Iterator[tuple[str, torch.Tensor]]:
    for source in sources:
        for name, tensor in _cut_up(source, checkpoint.read(source.name), model):
            yield name, tensor
            advance(tensor.numel())


def _llama_shapes(
    checkpoint: MegatronCheckpoint, sources: list[Source], model: Architecture
) -> dict[str, tuple[int, ...]]:
    return {
        name: tuple(tensor.shape)
        for source in sources
        for name, tensor in _cut_up(
            source, torch.empty(checkpoint.tensors[source.name].shape, device="meta"), model
        )
    }


def _cut_up(
    source: Source, stored: torch.Tensor, model: Architecture
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield Llama's (name, tensor) of one stored tensor, of one layer or of all of them."""
    layers = stored.unbind(0) if source.stacked else (stored,)
    all_names = list(llama_names(source, model.num_layers))
    if len(layers) != len(all_names):
        raise ValueError(f"expected {source.name} of {len(all_names)} layers, got {len(layers)}")
    for names, layer in zip(all_names, layers, strict=True):
        yield from zip(names, LAYOUTS[source.row.layout](layer, model), strict=True)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


@contextmanager
def _new_folder(output: Path) -> Iterator[Path]:
    """Yield a temporary folder beside `output` that takes its place if the block succeeds."""
    output.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{output.name}-", dir=output.parent))
    try:
        new = temporary / "new"
        new.mkdir()
        yield new
        if output.exists():
            output.replace(temporary / "old")
        new.replace(output)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
