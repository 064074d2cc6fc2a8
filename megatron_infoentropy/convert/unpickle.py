"""Reading pickles that may come from anywhere: nothing in them can run.

A checkpoint's index and its training arguments are pickles, and a pickle may name any function to
be called while it is loaded. Here only the names of an allow-list are real. Every other class or
function becomes a stand-in that remembers its arguments and does nothing, so that arguments which
hold objects of Megatron's own classes can be read where Megatron is not installed.

A pickle refers to what it has built before, so that thirty tuples, each of the one before twice,
are a tree of a billion: whoever hashes, compares or prints it, as a dict does with its keys while
it is loaded, never ends. So its operations are followed first, with sizes in the place of objects.
(Lists that are filled after they were put into others escape; they are no keys. Print by reprlib.)
"""

import argparse
import collections
import io
import pickle
import pickletools
import zipfile
from collections.abc import Mapping
from typing import IO, Any

import torch

from megatron_infoentropy.convert.errors import ConversionError

DTYPES: dict[tuple[str, str], Any] = {
    ("torch", name): value for name, value in vars(torch).items() if isinstance(value, torch.dtype)
}
_PLACES = ("PUT", "BINPUT", "LONG_BINPUT")
_RECALLS = ("GET", "BINGET", "LONG_BINGET")
_GROWS = ("APPEND", "APPENDS", "SETITEM", "SETITEMS", "ADDITEMS", "BUILD")  # what lies below
_TIMES = 100  # written out, a checkpoint's index has a few objects a byte at most


def require_bounded(data: bytes) -> None:
    """Follow a pickle's operations without doing them.

    Raises:
        ValueError: a bytearray, whose size is taken before it is read; a far place in the memo; an
            object that is more than a hundred times the pickle, written out.
        LookupError: operations that no pickler writes.
    """
    limit = _TIMES * max(len(data), 100)
    stack: list[list[int] | None] = []  # the size of each object, in a box that its owners share
    memo: dict[int, list[int] | None] = {}
    for opcode, argument, _ in pickletools.genops(data):
        name = opcode.name
        if name == "BYTEARRAY8" or (name in _PLACES and int(argument or 0) > len(data)):
            raise ValueError(f"{name} {argument!r:.40} in {len(data)} bytes")
        if name in _PLACES or name == "MEMOIZE":
            memo[len(memo) if name == "MEMOIZE" else int(argument or 0)] = stack[-1]
        elif name in _RECALLS:
            stack.append(memo[int(argument or 0)])
        elif name == "DUP":
            stack.append(stack[-1])
        elif name == "MARK":
            stack.append(None)
        else:
            _apply(opcode, stack, limit)


def _apply(opcode: pickletools.OpcodeInfo, stack: list[list[int] | None], limit: int) -> None:
    """Take from the stack what an operation takes, and put there what it makes of it."""
    size, taken = 1, opcode.stack_before
    if pickletools.markobject in taken:
        while (box := stack.pop()) is not None:
            size += box[0]
        taken = taken[: taken.index(pickletools.markobject)]
    boxes = [stack.pop() for _ in taken]
    size += sum(box[0] for box in boxes if box)
    if size > limit:
        raise ValueError(f"an object of more than {limit} parts in a pickle much smaller")
    if opcode.name in _GROWS and boxes[-1]:
        boxes[-1][0] = size
        stack.append(boxes[-1])
    else:
        stack.extend([size] for _ in opcode.stack_after)


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
    """Load a pickle with the classes of `allowed`, {(module, name): class}, and stand-ins."""
    try:
        require_bounded(data)
        return _Unpickler(data, allowed or {}).load()
    except _DAMAGE as error:
        raise ConversionError(
            f"expected a pickle of plain data, got one that fails: {error}"
        ) from error


def load_object(file: IO[bytes], where: str) -> Any:
    """Load what torch.save wrote, without the numbers of its tensors and without running it."""
    return unpickle(pickle_of(file, where), DTYPES)


def pickle_of(file: IO[bytes], where: str) -> bytes:
    """Return the pickle in the archive that torch.save writes, when it is known to be bounded."""
    try:
        if file.read(4) != b"PK\x03\x04":
            raise ValueError("it begins otherwise")
        archive = zipfile.ZipFile(file)
        member = next(m for m in archive.infolist() if m.filename.endswith("/data.pkl"))
        if member.compress_type != zipfile.ZIP_STORED or member.file_size != member.compress_size:
            raise ValueError("data.pkl is compressed, which torch.save never does")
        content = archive.read(member)
        require_bounded(content)
    except Exception as error:  # damage ends in errors of every kind
        raise ConversionError(
            f"{where}: expected the archive that torch.save writes, got something else; the file "
            f"is damaged or was cut off, copy it again ({type(error).__name__}: {error})"
        ) from error
    return content
