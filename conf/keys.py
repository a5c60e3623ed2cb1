"""The keys of a command as one flat list of dotted names, and the checks of a single value."""

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from omegaconf import MISSING, BooleanNode, FloatNode, IntegerNode, StringNode, ValidationError

from moexpand.base.errors import InputError

NODES: dict[type, Any] = {int: IntegerNode, float: FloatNode, bool: BooleanNode, str: StringNode}
NAMES = {int: "int", float: "float", bool: "bool", str: "text", list: "list"}
TAKES = {int: "a whole number", float: "a number", bool: "true or false", str: "text", list: "a list"}


@dataclass(frozen=True)
class Key:
    """One key of a command.

    Attributes:
        name: dotted, such as "optim.lr".
        type: int, float, bool, str or list.
        optional: None ("not given") is a value.
        default: its default; `MISSING` when the key must be given.
        help: one line.
        choices: the allowed words, or nothing.
        within: the allowed interval of a number such as "[0, 1)", or nothing.
        items: type of what a list holds, str or int.
    """

    name: str
    type: type
    optional: bool
    default: Any
    help: str
    choices: tuple[str, ...]
    within: str
    items: Any = str

    @property
    def required(self) -> bool:
        """Whether it must be given."""
        return isinstance(self.default, str) and self.default == MISSING

    @property
    def type_name(self) -> str:
        """Its type in a word."""
        return NAMES[self.type]


def keys_of(command: type, prefix: str = "") -> dict[str, Key]:
    """Every key of a dataclass and of the dataclasses inside it, by dotted name, in the order of their declaration."""
    found: dict[str, Key] = {}
    types_of = typing.get_type_hints(command)
    for field in dataclasses.fields(command):
        name, annotation = prefix + field.name, types_of[field.name]
        if dataclasses.is_dataclass(annotation):
            found |= keys_of(typing.cast(type, annotation), name + ".")
            continue
        optional = isinstance(annotation, types.UnionType)
        if optional:
            annotation = next(option for option in typing.get_args(annotation) if option is not types.NoneType)
        default = field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default
        kind, items = typing.get_origin(annotation) or annotation, (*typing.get_args(annotation), str)[0]
        words = field.metadata
        allowed = words.get("choices", ()), words.get("within", "")
        found[name] = Key(name, kind, optional, default, words["help"], *allowed, items)
    return found


def parts_of(command: type, prefix: str = "") -> dict[str, str]:
    """The dotted names of a command's nested dataclasses, each with its line of help."""
    found: dict[str, str] = {}
    types_of = typing.get_type_hints(command)
    for field in dataclasses.fields(command):
        if dataclasses.is_dataclass(types_of[field.name]):
            found[prefix + field.name] = field.metadata["help"]
            found |= parts_of(typing.cast(type, types_of[field.name]), f"{prefix}{field.name}.")
    return found


def did_you_mean(word: str, words: Iterable[str]) -> str:
    """ "; did you mean X" for the nearest of `words`, or an empty string when none is near.

    Dotted names are near when they are spelt alike, or when their last parts are.
    """
    words = list(words)
    last = word.rpartition(".")[2]
    same_end = [other for other in words if other.rpartition(".")[2] == last]
    near = same_end or difflib.get_close_matches(word, words, n=1, cutoff=0.6)
    if not near:
        ends = {other.rpartition(".")[2]: other for other in reversed(words)}
        near = [ends[end] for end in difflib.get_close_matches(last, ends, n=1, cutoff=0.75)]
    return f"; did you mean {near[0]}" if near else ""


def check_value(key: Key, value: Any, where: str) -> None:
    """Check one value of a key: its type, its words, its interval.

    Args:
        key: the key.
        value: as YAML or an override gives it; text that spells a number is a number, as everywhere in YAML.
        where: the end of the sentence's subject, such as " in mine.yaml"; may be empty.

    Raises:
        InputError: the value does not fit.
    """
    if isinstance(value, str) and (value == MISSING or "${" in value):
        return
    if value is None and key.optional:
        return
    shown = f"{key.name}={'null' if value is None else value}{where}"
    typed = _typed(key, value)
    if typed is None:
        example = f", such as {key.name}={'[1,2]' if key.items is int else '[a,b]'}" if key.type is list else ""
        raise InputError(f"{shown} has the wrong type: {key.name} takes {TAKES[key.type]}{example}.")
    if key.choices and typed not in key.choices:
        guess = did_you_mean(str(typed), key.choices)
        raise InputError(f"{shown} is not among {', '.join(key.choices)}{guess}{'?' if guess else '.'}")
    if key.within and not _inside(typed, key.within):
        raise InputError(f"{shown} is outside {key.within}, the values that {key.name} can have.")


def _typed(key: Key, value: Any) -> Any:
    """The value in the key's type, converted as OmegaConf converts it; None when it cannot be."""
    if key.type is list:
        return value if isinstance(value, list) and all(type(item) is key.items for item in value) else None
    try:
        return NODES[key.type](value, is_optional=False)._value()
    except ValidationError:
        return None


def _inside(number: float, interval: str) -> bool:
    low, high = (float(end) for end in interval[1:-1].split(","))
    above = number >= low if interval[0] == "[" else number > low
    below = number <= high if interval[-1] == "]" else number < high
    return above and below and not math.isnan(number)


def check_tree(command: type, tree: Mapping[str, Any], where: str, subject: str, prefix: str = "") -> None:
    """Check every key and value of a nested mapping against a command's dataclass.

    Args:
        command: the dataclass.
        tree: nested mappings of values, as YAML gives them; it need not hold every key.
        where: " in FILE", or an empty string; ends the subject of each sentence.
        subject: what the keys belong to, such as "`moexpand train`".

    Raises:
        InputError: an unknown key (with the nearest known one), or a value that does not fit.
    """
    keys, parts = keys_of(command), parts_of(command)
    for name, value in tree.items():
        dotted = f"{prefix}{name}"
        if dotted in keys:
            check_value(keys[dotted], value, where)
        elif dotted in parts and isinstance(value, Mapping):
            check_tree(command, value, where, subject, dotted + ".")
        elif dotted in parts:
            raise InputError(part_is_not_a_value(dotted, value, where, keys))
        else:
            raise InputError(unknown_key(dotted, where, keys, subject))


def unknown_key(name: str, where: str, known: Iterable[str], subject: str) -> str:
    """The sentence about a key that does not exist."""
    guess = did_you_mean(name, known)
    command = subject.strip("`")
    return f"{name}{where} is not a key of {subject}" + (f"{guess}?" if guess else f"; `{command} --help` lists them.")


def part_is_not_a_value(name: str, value: Any, where: str, known: Iterable[str]) -> str:
    """The sentence about a value given to a whole part of the configuration."""
    example = next(key for key in known if key.startswith(name + "."))
    return f"{name}={value}{where} gives one value to a part that holds several keys; give them one by one, such as {example}=..."
