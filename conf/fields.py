"""Fields of the dataclasses in schema.py: a default with its line of help and what it may hold; which of them were changed."""

from collections.abc import Iterator
from dataclasses import field, fields, is_dataclass
from typing import Any


def key(default: Any, help: str, choices: tuple[str, ...] = (), within: str = "") -> Any:
    """A field with its line of help and, for words, the allowed ones; for numbers, the allowed interval such as "[0, 1)"."""
    return field(default=default, metadata={"help": help, "choices": choices, "within": within})


def words(help: str) -> Any:
    """A field that holds a list of words, empty by default."""
    return field(default_factory=list, metadata={"help": help})


def numbers(help: str) -> Any:
    """A field that holds a list of whole numbers, empty by default."""
    return field(default_factory=list, metadata={"help": help})


def part(cls: type, help: str) -> Any:
    """A field that holds a nested dataclass."""
    return field(default_factory=cls, metadata={"help": help})


def changed(part: Any, name: str) -> list[str]:
    """`name.key=value` of every key of a part that is not at its default, as a command line gives it."""
    return list(_changed(part, type(part)(), name))


def _changed(part: Any, default: Any, name: str) -> Iterator[str]:
    for each in fields(part):
        value, usual, key = getattr(part, each.name), getattr(default, each.name), f"{name}.{each.name}"
        if is_dataclass(value):
            yield from _changed(value, usual, key)
        elif value != usual:
            yield f"{key}={_told(value)}"


def _told(value: Any) -> str:
    if isinstance(value, list):
        return f"[{','.join(map(_told, value))}]"
    return {True: "true", False: "false", None: "null"}[value] if value is None or isinstance(value, bool) else str(value)
