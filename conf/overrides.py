"""One `key=value` of the command line, checked by our own rules and rewritten in Hydra's grammar.

Hydra drops some mistakes in silence (`+typo=3`) and takes characters that are common in paths (`=`, `,`, brackets) as grammar.
So names, types and words are checked here, and a value of a key that holds text is taken as it stands.
"""

import re

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from moexpand.base.errors import InputError
from moexpand.conf.keys import TAKES, Key, check_value, did_you_mean, keys_of, part_is_not_a_value, parts_of, unknown_key


def to_hydra(text: str, schema: type, groups: dict[str, list[str]], subject: str) -> str:
    """Check one override and return it as Hydra reads it.

    Args:
        text: `key=value`, `group=option`; a leading `+` or `++` changes nothing, because every key exists already.
        schema: the command's dataclass.
        groups: options of every group of the command.
        subject: the command as sentences name it, such as "`moexpand train`".

    Raises:
        InputError: not `key=value`, an unknown key or option, a wrong type, a word or number that is not allowed.
    """
    keys, parts = keys_of(schema), parts_of(schema)
    name, equals, value = text.partition("=")
    name = name.lstrip("+").strip()
    if not equals or not name:
        guess = did_you_mean(name, [*keys, *groups])
        raise InputError(f"{text!r} is not key=value{guess}{'?' if guess else '.'}")
    if name.startswith("~"):
        raise InputError(f"{text} would delete a key, which nothing needs; leave {name[1:]} out to keep its default.")
    if not value:
        raise InputError(f"{text} gives no value to {name}; leave the key out to keep its default.")
    if name in keys:
        return f"{name}={_value(keys[name], value, text)}"
    if name in groups:
        return f"{name}={_option(name, value, groups[name])}"
    if name in parts:
        raise InputError(part_is_not_a_value(name, value, "", keys))
    raise InputError(unknown_key(name, "", [*keys, *groups], subject))


def _option(group: str, value: str, options: list[str]) -> str:
    if value not in options:
        guess = did_you_mean(value, options)
        offer = f"{guess}?" if guess else f"; the options are {', '.join(options)}."
        raise InputError(f"{group}={value} is not an option of the group {group}{offer}")
    return quoted(value)


def _value(key: Key, value: str, text: str) -> str:
    """The value in Hydra's grammar; a key that holds text gets it literally, `null` and quoted text aside."""
    literal = value[:1] not in ("'", '"') and value != "null"
    if key.type is str and literal:
        value = quoted(value)
    elif key.type is list and literal and not value.startswith("["):
        value = f"[{quoted(value)}]"
    value = _plain_list(key, value)
    try:
        override = OverridesParser.create().parse_override(f"{key.name}={value}")
    except HydraException:
        raise InputError(
            f"{text} cannot be read: {key.name} takes {TAKES[key.type]}; put quotes round unusual characters."
        ) from None
    if override.is_sweep_override():
        raise InputError(f"{text} gives several values to {key.name}; give one.")
    check_value(key, override.value(), "")
    return value


def _plain_list(key: Key, value: str) -> str:
    """A list of words that Hydra cannot read, such as `[--mem=0,export A=b]`, with its words quoted; others as they are."""
    if key.type is not list or not (value.startswith("[") and value.endswith("]")) or re.search(r"[\[\]'\"{}()\\]", value[1:-1]):
        return value
    try:
        OverridesParser.create().parse_override(f"{key.name}={value}")
    except HydraException:
        return f"[{','.join(quoted(word.strip()) for word in value[1:-1].split(','))}]"
    return value


def quoted(text: str) -> str:
    """`text` as a quoted word of Hydra's grammar: inside, only quotes and the backslashes before them are escaped."""
    return "'" + re.sub(r"(\\*)('|$)", lambda found: found[1] * 2 + ("\\'" if found[2] else ""), text) + "'"
