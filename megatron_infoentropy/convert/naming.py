"""Which parameter of Megatron becomes which parameters of Llama: one table.

A `*` stands for the layer. On disk it is either a number (`decoder.layers.3.mlp...`) or absent
(`decoder.layers.mlp...`): then the tensors of all layers are stacked into one, layer first, which
is what Megatron writes for models whose layers are all alike.
"""

import re
from collections.abc import Iterable, Iterator
from typing import Literal, NamedTuple

from megatron_infoentropy.convert.architecture import Architecture, UnsupportedModelError

Layout = Literal["norm", "vocabulary", "qkv", "attention_output", "gate_up", "down"]


class Row(NamedTuple):
    """One parameter of Megatron, the parameters of Llama it holds, and how it holds them."""

    megatron: str
    llama: tuple[str, ...]
    layout: Layout


_ATTENTION, _MLP = "model.layers.*.self_attn.", "model.layers.*.mlp."
_NORM_1 = ("model.layers.*.input_layernorm.weight",)
_NORM_2 = ("model.layers.*.post_attention_layernorm.weight",)

TABLE = (
    Row("embedding.word_embeddings.weight", ("model.embed_tokens.weight",), "vocabulary"),
    # A norm belongs to the linear layer behind it (Transformer Engine) or stands alone (local).
    Row("decoder.layers.*.self_attention.linear_qkv.layer_norm_weight", _NORM_1, "norm"),
    Row("decoder.layers.*.input_layernorm.weight", _NORM_1, "norm"),
    Row(
        "decoder.layers.*.self_attention.linear_qkv.weight",
        (_ATTENTION + "q_proj.weight", _ATTENTION + "k_proj.weight", _ATTENTION + "v_proj.weight"),
        "qkv",
    ),
    Row(
        "decoder.layers.*.self_attention.linear_proj.weight",
        (_ATTENTION + "o_proj.weight",),
        "attention_output",
    ),
    Row("decoder.layers.*.mlp.linear_fc1.layer_norm_weight", _NORM_2, "norm"),
    Row("decoder.layers.*.pre_mlp_layernorm.weight", _NORM_2, "norm"),
    Row(
        "decoder.layers.*.mlp.linear_fc1.weight",
        (_MLP + "gate_proj.weight", _MLP + "up_proj.weight"),
        "gate_up",
    ),
    Row("decoder.layers.*.mlp.linear_fc2.weight", (_MLP + "down_proj.weight",), "down"),
    Row("decoder.final_layernorm.weight", ("model.norm.weight",), "norm"),
    Row("output_layer.weight", ("lm_head.weight",), "vocabulary"),
)

_ROWS = {row.megatron: row for row in TABLE}
_LAYER = re.compile(r"decoder\.layers\.(?:(\d+)\.)?")


class Source(NamedTuple):
    """A stored tensor, its row of the table, and the layer it belongs to.

    `layer` is None outside the layers; `stacked` says that the tensor holds all of them.
    """

    name: str
    row: Row
    layer: int | None
    stacked: bool


def match_names(names: Iterable[str], architecture: Architecture) -> list[Source]:
    """Match every stored parameter with the table, in the order of the model.

    Raises:
        UnsupportedModelError: parameters Llama has not, or has and were not stored.
    """
    sources, unknown = [], []
    for name in names:
        row = _ROWS.get(_LAYER.sub("decoder.layers.*.", name))
        if row is None:
            unknown.append(name)
        else:
            layer = _LAYER.match(name)
            number = None if layer is None or layer[1] is None else int(layer[1])
            sources.append(Source(name, row, number, layer is not None and number is None))
    if unknown:
        raise UnsupportedModelError(
            f"LlamaForCausalLM has no counterpart for {_some(unknown)}: biases, experts, norms of "
            "queries and keys, other attention, or a HybridModel"
        )
    _require_exactly_once(sources, architecture)
    return sorted(sources, key=lambda source: (TABLE.index(source.row), source.layer or 0))


def llama_names(source: Source, num_layers: int) -> Iterator[tuple[str, ...]]:
    """Yield Llama's names for each of the layers that the stored tensor holds (or once)."""
    layers = range(num_layers) if source.stacked else (source.layer,)
    for layer in layers:
        yield tuple(name.replace("*", str(layer)) for name in source.row.llama)


def _require_exactly_once(sources: list[Source], architecture: Architecture) -> None:
    found = [
        name
        for source in sources
        for names in llama_names(source, architecture.num_layers)
        for name in names
    ]
    wanted = {
        name.replace("*", str(layer))
        for row in TABLE
        for name in row.llama
        for layer in range(architecture.num_layers)
    }
    if architecture.tied_embeddings:
        wanted.discard("lm_head.weight")
    if missing := sorted(wanted - set(found)):
        raise UnsupportedModelError(f"the checkpoint lacks the parameters behind {_some(missing)}")
    if extra := sorted(set(found) - wanted) or sorted({n for n in found if found.count(n) > 1}):
        raise UnsupportedModelError(
            f"the checkpoint holds more than one parameter, or one too many, for {_some(extra)}"
        )


def _some(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
