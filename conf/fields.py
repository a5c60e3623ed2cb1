"""Fields of the dataclasses in schema.py: a default with its line of help and what it may hold."""

from dataclasses import field
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
