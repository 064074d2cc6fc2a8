"""Every stored tensor finds its row of the table, and every row its tensor; or it is refused."""

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import product
from typing import NamedTuple

from megatron_infoentropy.convert.architecture import CLASSES, Architecture
from megatron_infoentropy.convert.errors import IncompleteCheckpointError, UnsupportedModelError
from megatron_infoentropy.convert.naming import TABLES, Dim, Row

_COUNTED = re.compile(r"(^decoder\.layers\.|\.experts\.experts\.)(?:(\d+)\.)?")  # by a number


class Source(NamedTuple):
    """A stored tensor, its row of the table, and where in the model it belongs.

    `numbers` has one for every `*` of the row; None says that the tensor holds all of them.
    """

    name: str
    row: Row
    numbers: tuple[int | None, ...]


class Step(NamedTuple):
    """One thing to convert at a time: a stored tensor, or the part of it that has one place."""

    source: Source
    place: tuple[int, ...]
    hf: tuple[str, ...]

    @property
    def part(self) -> tuple[int, ...]:
        """Where in the stored tensor the part is, along its first axes."""
        pairs = zip(self.place, self.source.numbers, strict=True)
        return tuple(number for number, alone in pairs if alone is None)

    def __str__(self) -> str:
        at = [f"{kind} {n}" for kind, n in zip(("layer", "expert"), self.place, strict=False)]
        return f"{self.source.name} ({', '.join(at)})" if at else self.source.name


def match_names(names: Iterable[str], model: Architecture) -> list[Source]:
    """Match every stored parameter with the family's table.

    Raises:
        UnsupportedModelError: parameters that the family has not.
        IncompleteCheckpointError: parameters that the family has and were not stored.
    """
    rows = {row.megatron: row for row in rows_of(model)}
    sources, unknown = [], []
    for name in names:
        row = rows.get(_COUNTED.sub(r"\1*.", name))
        if row is None:
            unknown.append(name)
        else:
            numbers = (found[2] for found in _COUNTED.finditer(name))
            sources.append(Source(name, row, tuple(n if n is None else int(n) for n in numbers)))
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
        ranges = [
            range(count) if number is None else (number,)
            for number, count in zip(source.numbers, counts(model), strict=False)
        ]
        steps += [Step(source, place, source.row.names(place)) for place in product(*ranges)]

    def order_of(step: Step) -> tuple[bool, tuple[int, ...], int, tuple[int, ...]]:
        last = not step.place and not step.source.name.startswith("embedding.")
        return last, step.place[:1], order[step.source.row], step.place

    return sorted(steps, key=order_of)


def counts(model: Architecture) -> tuple[int, ...]:
    """Return how many there are of what each `*` of a name stands for, in their order."""
    return model.num_layers, model.num_experts


def places(row: Row, model: Architecture) -> Iterator[tuple[int, ...]]:
    """Yield every place of a row: () outside the layers."""
    return product(*map(range, counts(model)[: row.megatron.count("*")]))


def dimensions(model: Architecture) -> dict[Dim, int]:
    """Return the sizes by the names that the table uses."""
    return {
        "hidden": model.hidden_size,
        "ffn": model.ffn_hidden_size,
        "gate_and_up": 2 * model.ffn_hidden_size,
        "experts": model.num_experts,
        "expert_ffn": model.expert_ffn_size,
        "expert_gate_and_up": 2 * model.expert_ffn_size,
        "heads": model.num_heads * model.head_dim,
        "head": model.head_dim,
        "qkv": (model.num_heads + 2 * model.num_groups) * model.head_dim,
        "padded_vocabulary": model.padded_vocab_size,
        "positions": model.max_positions,
    }


def shape_of(row: Row, model: Architecture) -> tuple[int, ...]:
    """Return the shape that Megatron's parameter has in one place."""
    sizes = dimensions(model)
    return tuple(sizes[dim] for dim in row.shape)


def require_shape(source: Source, shape: tuple[int, ...], model: Architecture) -> None:
    """Compare a stored shape with the one that follows from the training arguments.

    Raises:
        ValueError: they differ; both are named.
    """
    pairs = zip(source.numbers, counts(model), strict=False)
    stacked = tuple(count for number, count in pairs if number is None)
    expected = (*stacked, *shape_of(source.row, model))
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
        for place in places(row, model):
            yield from row.names(place)


def _some(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
