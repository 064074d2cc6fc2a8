"""A Hugging Face folder as a checkpoint that Megatron-Core 0.19 loads under any parallel layout.

OUTPUT/latest_checkpointed_iteration.txt   "release": Megatron starts at iteration 0
OUTPUT/release/                            the parameters and arguments, in the format torch_dist
OUTPUT/model.yaml                          the flags that describe the model to Megatron's trainer
"""

import json
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
import yaml

from megatron_infoentropy.checkpoints import TRACKER, write_manifest
from megatron_infoentropy.convert.architecture import (
    CLASSES,
    FAMILIES,
    LEARNED,
    OBEYED_FACTOR,
    SAME,
    SAME_OF_EXPERTS,
    TOKENS,
    Architecture,
)
from megatron_infoentropy.convert.checkpoint import MegatronCheckpoint
from megatron_infoentropy.convert.distcp import Part, write_distcp
from megatron_infoentropy.convert.errors import ConversionError
from megatron_infoentropy.convert.hf_config import architecture_from_config, name_of, read_config
from megatron_infoentropy.convert.hf_weights import HEADS, HuggingFaceWeights
from megatron_infoentropy.convert.layout import LAYOUTS
from megatron_infoentropy.convert.model_card import BASE
from megatron_infoentropy.convert.naming import (
    EMBEDDING,
    TABLES,
    ConversionStep,
    counts,
    hf_shapes,
    hybrid_name,
    rows_of,
    steps_for,
)
from megatron_infoentropy.convert.to_hf import (
    Check,
    ConversionSummary,
    require_finite,
    require_place,
)
from megatron_infoentropy.convert.tokenizer import read_tokenizer
from megatron_infoentropy.data.tokenizer import TOKENIZER
from megatron_infoentropy.files import new_folder, require_space
from megatron_infoentropy.progress import Advance, progress

_SEQUENCE = 4096
"""Tokens a training sequence, unless the model has fewer positions or the user says otherwise."""


def arguments_of(model: Architecture, tokens: int | None = None) -> Namespace:
    """Return the arguments that describe this model, as a checkpoint of Megatron keeps them.

    tokens: of the model's tokenizer, where that is known; the model may have more rows.
    """
    table = {name: values[0] for name, values in FAMILIES[model.family].items()}
    same = (*SAME, *(SAME_OF_EXPERTS if model.num_experts else ()))
    scaled = model.rope_scaling_factor is not None
    values = table | {name: getattr(model, name) for name in same}
    if model.hybrid:
        values["hybrid_layer_pattern"] = "*-" * model.num_layers
    if scaled:
        values[OBEYED_FACTOR] = model.rope_scaling_factor
    if model.num_experts:
        values |= {
            "moe_router_pre_softmax": not model.norm_topk_prob,
            "moe_router_load_balancing_type": "aux_loss",
            "moe_aux_loss_coeff": model.moe_aux_loss_coeff,
        }
    return Namespace(
        **values
        | {
            "num_layers": model.num_layers * (2 if model.hybrid else 1),
            "group_query_attention": model.num_query_groups != model.num_attention_heads,
            "num_query_groups": model.num_query_groups,
            "seq_length": min(model.max_position_embeddings, _SEQUENCE),
            "add_position_embedding": True,
            "rotary_base": int(model.rotary_base),
            "rotary_interleaved": model.rotary_interleaved,
            "use_rope_scaling": scaled,
            "rope_scaling_factor": model.rope_scaling_factor if scaled else 8.0,
            "add_qkv_bias": model.qkv_bias and not model.add_bias_linear,
            "bias_gelu_fusion": model.activation == "gelu_tanh",
            "vocab_size": model.vocab_size,
            TOKENS: tokens,
            "tensor_model_parallel_size": 1,
            "pipeline_model_parallel_size": 1,
            "iteration": 0,
            "consumed_train_samples": 0,
        }
    )


def flags_of(model: Architecture) -> dict[str, Any]:
    """Return the flags that tell Megatron's trainer of this model: {name without dashes: value}."""
    args = arguments_of(model)
    learned = args.position_embedding_type == LEARNED
    flags = {
        name.replace("_", "-"): getattr(args, name)
        for name in (
            "hybrid_layer_pattern" if model.hybrid else "num_layers",
            *("hidden_size", "ffn_hidden_size", "num_attention_heads"),
            *("kv_channels", "max_position_embeddings", "seq_length", "position_embedding_type"),
            *("normalization", "swiglu", "add_qkv_bias", "qk_layernorm", "init_method_std"),
            *("untie_embeddings_and_output_weights", "attention_dropout", "hidden_dropout"),
            *("num_experts", "moe_router_topk", "moe_ffn_hidden_size", "moe_router_pre_softmax"),
            *("moe_router_load_balancing_type", "moe_aux_loss_coeff", "vocab_size"),
        )
        if hasattr(args, name)
    }
    flags["norm-epsilon"] = args.layernorm_epsilon
    flags["disable-bias-linear"] = not args.add_bias_linear
    if args.group_query_attention:
        flags |= {"group-query-attention": True, "num-query-groups": args.num_query_groups}
    if not learned:
        flags |= {"rotary-base": args.rotary_base, "rotary-percent": args.rotary_percent}
    if args.use_rope_scaling:
        flags |= {"use-rope-scaling": True, "rope-scaling-factor": args.rope_scaling_factor}
    # Megatron's fused gelu is the tanh approximation; its other gelu is exact.
    flags["no-bias-gelu-fusion"] = model.activation == "gelu"
    return {name: value for name, value in flags.items() if value is not False}


_FILES = (TRACKER, "release", "model.yaml")  # of an import: what --overwrite may replace


def convert_from_hf(
    folder: Path,
    output: Path,
    *,
    hybrid: bool = False,
    overwrite: bool = False,
    check: Check = lambda checkpoint, folder: None,
) -> ConversionSummary:
    """Write a Hugging Face model as a Megatron checkpoint, to continue its training.

    Args:
        folder: the Hugging Face folder, with safetensors files.
        output: the folder to make; give it to Megatron as `--pretrained-checkpoint`.
        hybrid: of a HybridModel, each of whose layers is attention or an MLP; else of a GPTModel.
        overwrite: replace an existing output.
        check: called with both sides before the output gets its name; if it raises, it never does.

    Raises:
        ConversionError: the weights cannot be read, Megatron's model cannot compute this one, or
            there are NaN or infinity in it.
        ValueError: too little space, an existing output, or a tokenizer in the folder that is
            damaged or has more tokens than the model has rows.
    """
    require_place(output, _FILES, overwrite=overwrite, source=folder)
    if not (folder / "config.json").is_file():
        raise ValueError(f"expected a Hugging Face model folder, got {folder} without config.json")
    model = replace(architecture_from_config(read_config(folder)), hybrid=hybrid)
    if hybrid and (model.num_experts or model.rope_scaling_factor is not None):
        what = "experts" if model.num_experts else "Llama 3's rotary scaling, which it ignores,"
        raise ConversionError(
            f"Megatron's HybridModel with {what} cannot be proved: convert to a GPTModel, without "
            "--hybrid"
        )
    tokens = _tokens(folder, model)
    weights = HuggingFaceWeights(folder, model.family)
    dtype, steps = weights.dtype, list(steps_to_write(model))
    _match(weights, steps, model)
    _require_zeros(weights, steps)
    require_space(output, weights.parameters * dtype.itemsize)
    flags = flags_of(model)
    with new_folder(output, replaceable=_FILES, overwrite=overwrite) as new:
        release = new / "release"
        with progress("import", sum(len(step.hf) for step in steps), "tensors") as advance:
            parts = _parts(steps, weights, model, dtype, advance)
            write_distcp(release, dtype, parts, _objects(model, tokens, _name(folder)))
        config = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
        (release / "metadata.json").write_text(json.dumps(config), encoding="utf-8")
        write_manifest(release)
        (new / TRACKER).write_text("release", encoding="utf-8")
        (new / "model.yaml").write_text(
            yaml.safe_dump({"model": flags}, sort_keys=False), encoding="utf-8"
        )
        check(MegatronCheckpoint(new), folder)
    return ConversionSummary(
        *(output, model.family, weights.parameters, name_of(dtype), model.vocab_size), flags=flags
    )


def _tokens(folder: Path, model: Architecture) -> int | None:
    """Return how many tokens the folder's tokenizer has; None where there is none."""
    if not (folder / TOKENIZER).is_file():
        return None
    tokens = read_tokenizer(folder).vocab_size
    if tokens > model.vocab_size:
        raise ValueError(
            f"the tokenizer in {folder} has {tokens} tokens, the model {model.vocab_size} rows: "
            "some ids would have no embedding; put the model's own tokenizer there, or none"
        )
    return tokens


def _match(weights: HuggingFaceWeights, steps: list[ConversionStep], model: Architecture) -> None:
    """Require of both sides that they have what the other has, with the right shapes."""
    if not model.untie_embeddings_and_output_weights:
        _leave_out_tied_head(weights, model)
    wanted = set()
    for step in steps:
        for name, shape in zip(step.hf, hf_shapes(step.row, model), strict=True):
            if name not in weights.tensors:
                raise ConversionError(f"the folder lacks the tensor {name}")
            got = weights.tensors[name].shape
            if got != tuple(shape):
                raise ValueError(
                    f"expected {name} of shape {list(shape)}, from config.json; got {list(got)}"
                )
            wanted.add(name)
    if unknown := sorted(weights.tensors.keys() - wanted):
        raise ConversionError(
            f"Megatron has no counterpart for {len(unknown)} tensors of this "
            f"{CLASSES[model.family]}: {', '.join(unknown[:4])}"
        )


def _leave_out_tied_head(weights: HuggingFaceWeights, model: Architecture) -> None:
    """Leave out the shared table where an export keeps it twice, if it is the same twice.

    transformers does not share tables that differ, whatever config.json says.
    """
    (table,) = (row.hf[0] for row in TABLES[model.family] if row.megatron == EMBEDDING)
    for head in HEADS:
        if {head, table} <= weights.tensors.keys() and not weights.equal(head, table):
            raise ConversionError(
                f"config.json says tie_word_embeddings: true, but {head} holds other numbers than "
                f"{table}; say false there to keep both, or remove {head} to keep the one"
            )
        weights.tensors.pop(head, None)


def _require_zeros(weights: HuggingFaceWeights, steps: list[ConversionStep]) -> None:
    """Look at the biases of Llama's attention that Megatron leaves out with --add-qkv-bias."""
    for step in steps:
        if step.row.layout == "and_zeros":
            *_, name = step.hf
            if largest := weights.read(name).abs().max().item():
                raise ConversionError(
                    f"expected {name} to be all zeros, got numbers up to {largest:.2g}: Megatron "
                    "has biases for queries, keys and values alone (--add-qkv-bias) or in every "
                    "linear layer; this model's MLP has none. Biases of zeros there, and "
                    "mlp_bias: true in config.json, make it one of the second kind"
                )


def steps_to_write(model: Architecture) -> Iterator[ConversionStep]:
    """Yield every parameter that has to be written, at every place; of several names the first.

    With experts both names of the norm before them: local layers ask for the one that they have
    without experts too, Transformer Engine's, which cannot join it to a linear layer then, do not.
    """
    done: set[str] = set()
    for row in rows_of(model):
        if not done & set(row.hf) or (model.num_experts and "pre_mlp_layernorm" in row.megatron):
            done |= set(row.hf)
            yield from (ways[0] for ways in steps_for(row, model))


def _parts(
    steps: list[ConversionStep],
    weights: HuggingFaceWeights,
    model: Architecture,
    dtype: torch.dtype,
    advance: Advance,
) -> Iterator[Part]:
    """Yield what to write: every parameter at every place, with what reads it."""

    def read(step: ConversionStep) -> torch.Tensor:
        parts = []
        for name in step.hf:
            part = weights.read(name)
            require_finite(name, part)
            parts.append(part.to(dtype))
            advance(1)
        return LAYOUTS[step.row.layout].to_megatron(tuple(parts), model)

    for step in steps:
        yield step.name, step.shape, step.part, partial(read, step)


def _name(folder: Path) -> str:
    """Return the model's name on the Hub, where the folder is of the Hub's cache; else its own."""
    parts = [part for part in folder.absolute().parts if part.startswith("models--")]
    name = parts[-1].removeprefix("models--").replace("--", "/", 1) if parts else ""
    return name or folder.resolve().name


def _objects(model: Architecture, tokens: int | None, name: str) -> dict[str, Any]:
    """{name: content} of what Megatron wants that is no parameter."""
    content_metadata = {"singleton_local_shards": False, "chained_optim_avoid_prefix": True}
    args = arguments_of(model, tokens)
    setattr(args, BASE, name)
    common = {
        "args": args,
        "checkpoint_version": 3.0,
        "iteration": 0,
        "content_metadata": content_metadata,
    }
    return {"common_state/shard_0_1": common, **dict.fromkeys(_extra_states(model))}


def _extra_states(model: Architecture) -> Iterator[str]:
    """Yield the names of what layers ask for beside their parameters, which is stored empty."""
    block = "mlp.experts.experts." if model.num_experts else "mlp."
    of_attention = ("linear_qkv", "linear_proj", "core_attention")
    modules = [(f"self_attention.{name}", 1) for name in of_attention]
    modules += [(f"{block}linear_fc{n}", 1 + (model.num_experts > 0)) for n in (1, 2)]
    for module, axes in modules:
        of = counts(model)[:axes]
        for place in product(*map(range, of)):
            if model.hybrid:
                name = hybrid_name(f"decoder.layers.*.{module}", place)
                yield f"{name}._extra_state/shard_0_1"
            else:
                first, last = (".".join(map(str, numbers)) for numbers in (place, of))
                yield f"decoder.layers.{module}._extra_state/shard_{first}_{last}"
    if model.hybrid:
        yield "output_layer._extra_state/shard_0_1"
