"""Reading pickles that may come from anywhere: nothing in them can run.

A checkpoint's index and its training arguments are pickles, and a pickle may name any function to
be called while it is loaded. Here only the names of an allow-list are real. Every other class or
function becomes a stand-in that remembers its arguments and does nothing, so that arguments which
hold objects of Megatron's own classes can be read where Megatron is not installed.
"""

import argparse
import collections
import io
import pickle
from collections.abc import Mapping
from typing import Any

from megatron_infoentropy.convert.errors import UnreadableCheckpointError
from megatron_infoentropy.convert.pickle_bounds import require_bounded

# What the standard library's unpickler raises for bytes that are no pickle of plain data.
_DAMAGE = (
    *(pickle.UnpicklingError, EOFError, AttributeError, TypeError, LookupError, ValueError),
    *(OverflowError, MemoryError, RecursionError, ImportError, AssertionError),
)


class StandIn:
    """What an object of a class outside the allow-list is read as."""

    arguments: tuple[Any, ...]
    state: Any

    def __new__(cls, *arguments: Any, **_: Any) -> "StandIn":
        self = super().__new__(cls)
        self.arguments = arguments
        self.state = None
        return self

    def __setstate__(self, state: Any) -> None:
        self.state = state

    # Unpickling a list or dict of an unknown class fills it through these.
    def append(self, item: Any) -> None:
        pass

    def extend(self, items: Any) -> None:
        pass

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def __repr__(self) -> str:
        # In part: an argument may hold others without end, or be a number without end.
        shown = [
            repr(a)[:80]
            if isinstance(a, str | float | None) or (isinstance(a, int) and a.bit_length() < 64)
            else "..."
            for a in self.arguments[:4]
        ]
        return f"{type(self).__name__}({', '.join(shown)})"


class _Unpickler(pickle.Unpickler):
    def __init__(self, data: bytes, allowed: Mapping[tuple[str, str], Any]) -> None:
        super().__init__(io.BytesIO(data))
        self._allowed = {
            # A pickle may set attributes of a class it names: this one is its own.
            ("argparse", "Namespace"): type("Namespace", (argparse.Namespace,), {}),
            ("collections", "OrderedDict"): collections.OrderedDict,
            **allowed,
        }

    def find_class(self, module_name: str, global_name: str) -> Any:
        real = self._allowed.get((module_name, global_name))
        return type(global_name, (StandIn,), {}) if real is None else real

    def persistent_load(self, pid: Any) -> Any:  # the storage of a tensor: its numbers stay unread
        return StandIn(pid)


def unpickle(data: bytes, allowed: Mapping[tuple[str, str], Any] | None = None) -> Any:
    """Load a pickle with the classes of `allowed`, {(module, name): class}, and stand-ins.

    Raises:
        UnreadableCheckpointError: the bytes are not a complete pickle.
    """
    try:
        require_bounded(data)
        return _Unpickler(data, allowed or {}).load()
    except _DAMAGE as error:
        raise UnreadableCheckpointError(
            f"expected a pickle of plain data, got one that fails: {error}"
        ) from error
