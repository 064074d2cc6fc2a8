"""Which parameter of Megatron becomes which parameters of a Hugging Face family: one table.

The first `*` stands for the layer. On Megatron's disk it is either a number
(`decoder.layers.3.mlp...`) or absent (`decoder.layers.mlp...`): then the tensors of all layers are
stacked into one, layer first, which is what Megatron writes for models whose layers are all alike.
The second `*` is the expert's, in the same way; `SequentialMLP` and Transformer Engine's grouped
layers write the same. A parameter's place is the number for each `*` of its name.

A HybridModel of attention, then an MLP, again and again has the names of a GPT whose layers are not
stacked, two layers for one: the halves of layer 3 are decoder.layers.6.self_attention... and
decoder.layers.7.mlp... Its last norm is decoder.final_norm.

`match_names` gives every stored tensor its row of the table, and every row its tensor, or refuses.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from itertools import product
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from megatron_infoentropy.convert.architecture import CLASSES, Architecture, Family
from megatron_infoentropy.convert.errors import ConversionError
from megatron_infoentropy.convert.layout import LAYOUTS


class Entry(NamedTuple):
    """One parameter of Megatron, the parameters of the family it holds, and how it holds them.

    Of two rows for one parameter the later is meant, where the model has what it needs.
    """

    megatron: str
    hf: tuple[str, ...]
    layout: str  # in LAYOUTS
    shape: tuple[str, ...]  # of Megatron's, at one place
    needs: str = ""  # the property of an Architecture without which it is absent

    def names(self, place: tuple[int, ...]) -> tuple[str, ...]:
        """Return the family's names at one place."""
        return tuple(name.replace("*", "{}").format(*place) for name in self.hf)


EMBEDDING = "embedding.word_embeddings.weight"
POSITIONS = "embedding.position_embeddings.weight"
OUTPUT = "output_layer.weight"
_QKV = "decoder.layers.*.self_attention.linear_qkv."
_PROJ = "decoder.layers.*.self_attention.linear_proj."
_FC1 = "decoder.layers.*.mlp.linear_fc1."
_FC2 = "decoder.layers.*.mlp.linear_fc2."
_EXPERT = "decoder.layers.*.mlp.experts.experts.*."


def _norms(
    first: str, second: str, last: str, kinds: tuple[Literal["weight", "bias"], ...]
) -> tuple[Entry, ...]:
    """A norm belongs to the linear layer behind it (Transformer Engine) or stands alone (local)."""
    return tuple(
        Entry(name + kind, (hf + kind,), "norm" if kind == "weight" else "same", ("hidden",))
        for kind in kinds
        for name, hf in (
            (_QKV + "layer_norm_", first),
            ("decoder.layers.*.input_layernorm.", first),
            (_FC1 + "layer_norm_", second),
            ("decoder.layers.*.pre_mlp_layernorm.", second),
            ("decoder.final_layernorm.", last),
        )
    )


def _head(module: str) -> Entry:
    """Return the output layer, which a model with tied embeddings has not."""
    size = ("padded_vocabulary", "hidden")
    needs = "untie_embeddings_and_output_weights"
    return Entry(OUTPUT, (f"{module}.weight",), "vocabulary", size, needs)


def _linear(
    name: str,
    hf: tuple[str, ...],
    layout: str,
    shape: tuple[str, ...],
    needs: str = "",
) -> tuple[Entry, Entry]:
    """A linear layer's weight and bias, the latter only where the model has what it `needs`."""
    weights, biases = (tuple(f"{each}.{kind}" for each in hf) for kind in ("weight", "bias"))
    of_bias = "same" if layout == "transposed" else layout
    return (
        Entry(name + "weight", weights, layout, shape),
        Entry(name + "bias", biases, of_bias, shape[:1], needs),
    )


_A, _M = "model.layers.*.self_attn.", "model.layers.*.mlp."
_LLAMA_ATTENTION = (
    Entry(EMBEDDING, ("model.embed_tokens.weight",), "vocabulary", ("padded_vocabulary", "hidden")),
    *_norms(
        "model.layers.*.input_layernorm.",
        "model.layers.*.post_attention_layernorm.",
        "model.norm.",
        ("weight",),
    ),
    *_linear(
        _QKV, (_A + "q_proj", _A + "k_proj", _A + "v_proj"), "qkv", ("qkv", "hidden"), "qkv_bias"
    ),
    *_linear(_PROJ, (_A + "o_proj",), "same", ("hidden", "heads"), "add_bias_linear"),
    Entry(
        _PROJ + "weight",
        (_A + "o_proj.weight", _A + "o_proj.bias"),
        "and_zeros",
        ("hidden", "heads"),
        "zero_proj_bias",
    ),
)
_LLAMA_MLP = (
    *_linear(
        *(_FC1, (_M + "gate_proj", _M + "up_proj"), "gate_up", ("gate_and_up", "hidden")),
        "add_bias_linear",
    ),
    # The format fsdp_dtensor keeps the two halves apart.
    Entry(_FC1 + "weight_w", (_M + "gate_proj.weight",), "same", ("ffn", "hidden")),
    Entry(_FC1 + "weight_v", (_M + "up_proj.weight",), "same", ("ffn", "hidden")),
    Entry(_FC1 + "bias_w", (_M + "gate_proj.bias",), "same", ("ffn",), "add_bias_linear"),
    Entry(_FC1 + "bias_v", (_M + "up_proj.bias",), "same", ("ffn",), "add_bias_linear"),
    *_linear(_FC2, (_M + "down_proj",), "same", ("hidden", "ffn"), "add_bias_linear"),
)
_LLAMA_HEAD = (_head("lm_head"),)
_LLAMA = _LLAMA_ATTENTION + _LLAMA_MLP + _LLAMA_HEAD
_QK_NORMS = tuple(
    Entry(
        f"decoder.layers.*.self_attention.{part}_layernorm.weight",
        (f"{_A}{part}_norm.weight",),
        "head_norm",
        ("head",),
    )
    for part in ("q", "k")
)


def _experts(block: str, gate: str, up: str, down: str) -> tuple[Entry, ...]:
    """Return the rows of a layer of experts, by a family's names of it and of their matrices."""
    one = f"{block}experts.*."
    return (
        Entry(
            "decoder.layers.*.mlp.router.weight",
            (f"{block}gate.weight",),
            "same",
            ("experts", "hidden"),
        ),
        Entry(
            _EXPERT + "linear_fc1.weight",
            (f"{one}{gate}.weight", f"{one}{up}.weight"),
            "gate_up",
            ("expert_gate_and_up", "hidden"),
        ),
        Entry(
            _EXPERT + "linear_fc2.weight",
            (f"{one}{down}.weight",),
            "same",
            ("hidden", "expert_ffn"),
        ),
    )


_MIXTRAL_MLP = _experts("model.layers.*.block_sparse_moe.", "w1", "w3", "w2")
_QWEN3_MOE_MLP = _experts(_M, "gate_proj", "up_proj", "down_proj")

_X = "gpt_neox.layers.*."
_GPT_NEOX = (
    Entry(EMBEDDING, ("gpt_neox.embed_in.weight",), "vocabulary", ("padded_vocabulary", "hidden")),
    *_norms(
        _X + "input_layernorm.",
        _X + "post_attention_layernorm.",
        "gpt_neox.final_layer_norm.",
        ("weight", "bias"),
    ),
    *_linear(_QKV, (_X + "attention.query_key_value",), "qkv_by_head", ("qkv", "hidden")),
    *_linear(_PROJ, (_X + "attention.dense",), "same", ("hidden", "heads")),
    *_linear(_FC1, (_X + "mlp.dense_h_to_4h",), "same", ("ffn", "hidden")),
    *_linear(_FC2, (_X + "mlp.dense_4h_to_h",), "same", ("hidden", "ffn")),
    _head("embed_out"),
)

_H = "transformer.h.*."
_GPT2 = (
    Entry(EMBEDDING, ("transformer.wte.weight",), "vocabulary", ("padded_vocabulary", "hidden")),
    Entry(POSITIONS, ("transformer.wpe.weight",), "same", ("positions", "hidden")),
    *_norms(_H + "ln_1.", _H + "ln_2.", "transformer.ln_f.", ("weight", "bias")),
    *_linear(_QKV, (_H + "attn.c_attn",), "qkv_in_columns", ("qkv", "hidden")),
    *_linear(_PROJ, (_H + "attn.c_proj",), "transposed", ("hidden", "heads")),
    *_linear(_FC1, (_H + "mlp.c_fc",), "transposed", ("ffn", "hidden")),
    *_linear(_FC2, (_H + "mlp.c_proj",), "transposed", ("hidden", "ffn")),
    _head("lm_head"),
)

TABLES: dict[Family, tuple[Entry, ...]] = {
    "llama": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA + _QK_NORMS,
    "mixtral": _LLAMA_ATTENTION + _MIXTRAL_MLP + _LLAMA_HEAD,
    "qwen3_moe": _LLAMA_ATTENTION + _QWEN3_MOE_MLP + _LLAMA_HEAD + _QK_NORMS,
    "gpt_neox": _GPT_NEOX,
    "gpt2": _GPT2,
}


class ConversionStep(NamedTuple):
    """One thing to convert at a time: a parameter at one place, and where it is stored."""

    row: Entry
    place: tuple[int, ...]
    name: str  # of the stored tensor
    shape: tuple[int, ...]  # of all of that
    part: tuple[int, ...]  # where in it, along its first axes

    @property
    def hf(self) -> tuple[str, ...]:
        return self.row.names(self.place)

    def __str__(self) -> str:
        at = [f"{kind} {n}" for kind, n in zip(("layer", "expert"), self.place, strict=False)]
        return f"{self.name} ({', '.join(at)})" if at else self.name


def steps_for(row: Entry, model: Architecture) -> Iterator[list[ConversionStep]]:
    """Yield for every place of a row in how many ways it may be stored, first as Megatron does."""
    shape = shape_of(row, model)
    of = counts(model)[: row.megatron.count("*")]
    for place in product(*map(range, of)):
        if model.hybrid:
            yield [ConversionStep(row, place, hybrid_name(row.megatron, place), shape, ())]
            continue
        steps = []
        for alone in product((False, True), repeat=len(place)):
            name, stacked = row.megatron, [n for n, one in enumerate(alone) if not one]
            for number, one in zip(place, alone, strict=True):
                name = name.replace("*.", f"{number}." if one else "", 1)
            part = tuple(place[n] for n in stacked)
            steps.append(
                ConversionStep(row, place, name, (*(of[n] for n in stacked), *shape), part)
            )
        yield steps


def hybrid_name(name: str, place: tuple[int, ...]) -> str:
    """Return how a hybrid stores what a GPT has under a name at a place, () or (layer,)."""
    if not name.startswith("decoder.layers.*."):
        return name.replace("decoder.final_layernorm.", "decoder.final_norm.")
    half = name.removeprefix("decoder.layers.*.")
    is_mlp = not half.startswith(("self_attention.", "input_layernorm."))
    return f"decoder.layers.{2 * place[0] + is_mlp}.{half}"


def match_names(tensors: Mapping[str, Tensor], model: Architecture) -> list[ConversionStep]:
    """Match every stored parameter with the family's table; return what to convert, in order.

    The order is the model's: embeddings, layers, the rest.
    """
    wanted = [ways for row in rows_of(model) for ways in steps_for(row, model)]
    steps = [step for ways in wanted for step in ways if step.name in tensors]
    shapes = {step.name: step.shape for step in steps}
    if unknown := [name for name in tensors if name not in shapes]:
        raise ConversionError(
            f"{CLASSES[model.family]} has no counterpart for {_some(unknown)}: experts, biases, "
            "norms or layers that the training arguments do not tell of, or other attention"
        )
    for name, tensor in tensors.items():
        if tuple(tensor.shape) != shapes[name]:
            raise ValueError(
                f"expected {name} of shape {list(shapes[name])}, from the training arguments; got "
                f"{list(tensor.shape)}"
            )
    if model.num_experts:  # an import has the norm before them under two names
        steps = list({(step.row.hf, step.place, step.part): step for step in steps}.values())
    stored = Counter(name for step in steps for name in step.hf)
    if missing := sorted({n for ways in wanted for n in ways[0].hf} - stored.keys()):
        raise ConversionError(f"the checkpoint lacks the parameters behind {_some(missing)}")
    if twice := sorted(name for name, count in stored.items() if count > 1):
        raise ConversionError(f"the checkpoint holds more than one parameter for {_some(twice)}")
    order = {row: number for number, row in enumerate(TABLES[model.family])}

    def order_of(step: ConversionStep) -> tuple[bool, tuple[int, ...], int, tuple[int, ...]]:
        last = not step.place and not step.name.startswith("embedding.")
        return last, step.place[:1], order[step.row], step.place

    return sorted(steps, key=order_of)


def rows_of(model: Architecture) -> list[Entry]:
    """Return the rows of the family's table that this model has."""
    rows = [row for row in TABLES[model.family] if not row.needs or getattr(model, row.needs)]
    return list({row.megatron: row for row in rows}.values())


def counts(model: Architecture) -> tuple[int, ...]:
    """Return how many there are of what each `*` of a name stands for, in their order."""
    return model.num_layers, model.num_experts


def shape_of(row: Entry, model: Architecture) -> tuple[int, ...]:
    """Return the shape that Megatron's parameter has in one place."""
    sizes = {
        "hidden": model.hidden_size,
        "ffn": model.ffn_hidden_size,
        "gate_and_up": 2 * model.ffn_hidden_size,
        "experts": model.num_experts,
        "expert_ffn": model.moe_ffn_hidden_size,
        "expert_gate_and_up": 2 * model.moe_ffn_hidden_size,
        "heads": model.num_attention_heads * model.kv_channels,
        "head": model.kv_channels,
        "qkv": (model.num_attention_heads + 2 * model.num_query_groups) * model.kv_channels,
        "padded_vocabulary": model.padded_vocab_size,
        "positions": model.max_position_embeddings,
    }
    return tuple(sizes[dim] for dim in row.shape)


def hf_shapes(row: Entry, model: Architecture) -> list[torch.Size]:
    """Return the shapes of the family's parameters; the layout runs on a tensor without numbers."""
    made = LAYOUTS[row.layout].to_hf(torch.empty(shape_of(row, model), device="meta"), model)
    return [tensor.shape for tensor in made]


def _some(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
