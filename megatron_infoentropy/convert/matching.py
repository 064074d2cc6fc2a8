"""Every stored tensor finds its row of the table, and every row its tensor; or it is refused."""

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from megatron_infoentropy.convert.architecture import Architecture
from megatron_infoentropy.convert.errors import IncompleteCheckpointError, UnsupportedModelError
from megatron_infoentropy.convert.families import CLASSES
from megatron_infoentropy.convert.naming import TABLES, Dim, Row

_LAYER = re.compile(r"decoder\.layers\.(?:(\d+)\.)?")


class Source(NamedTuple):
    """A stored tensor, its row of the table, and the layer it belongs to.

    `layer` is None outside the layers; `stacked` says that the tensor holds all of them.
    """

    name: str
    row: Row
    layer: int | None
    stacked: bool


class Step(NamedTuple):
    """One thing to convert at a time: a stored tensor, or the slice of it that is a layer's."""

    source: Source
    layer: int | None
    hf: tuple[str, ...]


def match_names(names: Iterable[str], model: Architecture) -> list[Source]:
    """Match every stored parameter with the family's table.

    Raises:
        UnsupportedModelError: parameters that the family has not.
        IncompleteCheckpointError: parameters that the family has and were not stored.
    """
    rows = {row.megatron: row for row in rows_of(model)}
    sources, unknown = [], []
    for name in names:
        layer = _LAYER.match(name)
        row = rows.get(_LAYER.sub("decoder.layers.*.", name))
        if row is None:
            unknown.append(name)
        else:
            number = None if layer is None or layer[1] is None else int(layer[1])
            sources.append(Source(name, row, number, layer is not None and number is None))
    if unknown:
        raise UnsupportedModelError(
            f"{CLASSES[model.family]} has no counterpart for {_some(unknown)}: experts, biases or "
            "norms that the training arguments do not tell of, other attention, or a HybridModel"
        )
    _require_exactly_once(sources, model)
    return sources


def rows_of(model: Architecture) -> list[Row]:
    """Return the rows of the family's table that this model has."""
    rows = [row for row in TABLES[model.family] if not row.needs or getattr(model, row.needs)]
    return list({row.megatron: row for row in rows}.values())


def steps_of(sources: Iterable[Source], model: Architecture) -> list[Step]:
    """Return what to convert, in the order of the model: embeddings, layers, the rest."""
    order = {row: number for number, row in enumerate(TABLES[model.family])}
    steps = []
    for source in sources:
        layers = range(model.num_layers) if source.stacked else (source.layer,)
        for layer in layers:
            steps.append(Step(source, layer, source.row.names(layer)))

    def place(step: Step) -> tuple[bool, int, int]:
        last = step.layer is None and not step.source.name.startswith("embedding.")
        return last, -1 if step.layer is None else step.layer, order[step.source.row]

    return sorted(steps, key=place)


def dimensions(model: Architecture) -> dict[Dim, int]:
    """Return the sizes by the names that the table uses."""
    return {
        "hidden": model.hidden_size,
        "ffn": model.ffn_hidden_size,
        "gate_and_up": 2 * model.ffn_hidden_size,
        "heads": model.num_heads * model.head_dim,
        "head": model.head_dim,
        "qkv": (model.num_heads + 2 * model.num_groups) * model.head_dim,
        "padded_vocabulary": model.padded_vocab_size,
        "positions": model.max_positions,
    }


def shape_of(row: Row, model: Architecture) -> tuple[int, ...]:
    """Return the shape that Megatron's parameter has in one layer."""
    sizes = dimensions(model)
    return tuple(sizes[dim] for dim in row.shape)


def require_shape(source: Source, shape: tuple[int, ...], model: Architecture) -> None:
    """Compare a stored shape with the one that follows from the training arguments.

    Raises:
        ValueError: they differ; both are named.
    """
    expected = shape_of(source.row, model)
    if source.stacked:
        expected = (model.num_layers, *expected)
    if shape != expected:
        raise ValueError(
            f"expected {source.name} of shape {list(expected)}, from the training arguments; got "
            f"{list(shape)}"
        )


def _require_exactly_once(sources: list[Source], model: Architecture) -> None:
    found = Counter(name for step in steps_of(sources, model) for name in step.hf)
    wanted = set(_hf_names(model))
    if missing := sorted(wanted - set(found)):
        raise IncompleteCheckpointError(
            f"the checkpoint lacks the parameters behind {_some(missing)}"
        )
    twice = [name for name, count in found.items() if count > 1]
    if extra := sorted(set(found) - wanted) or sorted(twice):
        raise UnsupportedModelError(
            f"the checkpoint holds more than one parameter, or one too many, for {_some(extra)}"
        )


def _hf_names(model: Architecture) -> Iterator[str]:
    for row in rows_of(model):
        for layer in range(model.num_layers):
            yield from row.names(layer)


def _some(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
