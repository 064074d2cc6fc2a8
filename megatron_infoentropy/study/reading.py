"""Small checks of what a YAML file says, each error naming the key, the value and what to do."""

from collections.abc import Collection
from math import inf
from typing import Any


class StudyError(ValueError):
    """A study that cannot be done as it is written, or a folder that belongs to something else."""


def section(
    name: str, content: object, known: Collection[str], required: Collection[str] = ()
) -> dict[str, Any]:
    """A mapping with known keys only, and with all required ones.

    Raises:
        StudyError: it is no mapping, has another key, or lacks one.
    """
    if not isinstance(content, dict):
        raise StudyError(f"{name}: expected `key: value` lines, got {content!r}")
    unknown = [str(key) for key in content if key not in known]
    if unknown:
        raise StudyError(f"{name} has no key {', '.join(unknown)}; it has {', '.join(known)}")
    missing = [key for key in required if key not in content]
    if missing:
        raise StudyError(f"{name} does not say {', '.join(missing)}")
    return content


def one_of_type(name: str, value: object, kind: type) -> Any:
    """The value, an int where a float is wanted made one.

    Raises:
        StudyError: it is of another type.
    """
    is_number = isinstance(value, int) and not isinstance(value, bool)
    if kind is float and is_number:
        return float(value)  # type: ignore[arg-type]
    if not isinstance(value, kind) or isinstance(value, bool):
        raise StudyError(f"{name}: expected {_WORDS[kind]}, got {value!r}")
    return value


def positive(name: str, value: object, kind: type) -> Any:
    """The value, a finite number above 0.

    Raises:
        StudyError: it is no such number.
    """
    number = one_of_type(name, value, kind)
    if not 0 < number < inf:
        raise StudyError(f"{name}: expected {_WORDS[kind]} above 0, got {value!r}")
    return number


_WORDS: dict[type, str] = {str: "a word", int: "a whole number", float: "a number"}
