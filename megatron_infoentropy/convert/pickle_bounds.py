"""Looks at a pickle before it is loaded: would a few bytes of it take any amount of time or memory?

A pickle refers to what it has built before, so that thirty tuples, each of the one before twice,
are a tree of a billion: whoever hashes, compares or prints it, as a dict does with its keys while
it is loaded, never ends. Here its operations are followed with sizes in the place of objects.
(Lists that are filled after they were put into others escape; they are no keys. Print by reprlib.)
"""

import pickletools

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
