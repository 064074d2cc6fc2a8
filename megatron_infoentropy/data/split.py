"""Whether documents name their domain as the Pile's do; the first of them tell."""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from megatron_infoentropy.data.blocks import BrokenLineError, read_blocks
from megatron_infoentropy.data.jsonl import BrokenRecordError, lines_of, parse_line, split_key
from megatron_infoentropy.data.options import AUTO, PILE_DOMAIN, Options


def decide_split(options: Options, inputs: Sequence[Path]) -> Options:
    """The options with AUTO replaced by what the first documents of the inputs call for.

    Those are the ones of the first block of the first file that has any. Without any, PILE_DOMAIN.
    """
    if options.split_by != AUTO:
        return options
    for path in inputs:
        named = _named(path, options.text_key)
        if named:
            return replace(options, split_by=PILE_DOMAIN if any(named) else None)
    return replace(options, split_by=PILE_DOMAIN)


def _named(path: Path, text_key: str) -> list[bool]:
    """Of each document in a file's first block; broken lines are for the run to report."""
    keys = split_key(PILE_DOMAIN)
    try:
        lines = lines_of(next(read_blocks(path)).data)
    except BrokenLineError:
        return []
    found = []
    for line in lines:
        with suppress(BrokenRecordError):
            found.append(parse_line(line, text_key, keys, named=None).domain is not None)
    return found
