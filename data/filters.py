"""Which samples are worth training on: every filter has a threshold in the configuration and a name under which drops count."""

import hashlib
from collections import Counter
from dataclasses import dataclass


@dataclass(frozen=True)
class Thresholds:
    """Limits that a sample must keep; see the `filters` keys of `moexpand data build`."""

    min_characters: int = 200
    max_symbol_ratio: float = 0.4
    max_repetition: float = 0.5


def drop_reason(kind: str, text: str, limits: Thresholds) -> str | None:
    """Name of the first filter that refuses a text, or None.

    Captions may be short, and tables are full of numbers: both filters hold for running text only.
    """
    if not text.strip():
        return "empty"
    if kind != "text":
        return None
    if len(text) < limits.min_characters:
        return "too_short"
    if symbol_ratio(text) > limits.max_symbol_ratio:
        return "symbols"
    if repetition(text) > limits.max_repetition:
        return "repetition"
    return None


def symbol_ratio(text: str) -> float:
    """Fraction of the characters that are neither letters nor white space (digits, punctuation, control characters)."""
    plain = sum(character.isalpha() or character.isspace() for character in text)
    return 1.0 - plain / max(len(text), 1)


def repetition(text: str) -> float:
    """Fraction of the characters that stand in a line which occurred before; white space at the ends does not count."""
    lines = [line for line in map(str.strip, text.splitlines()) if line]
    total = sum(map(len, lines))
    repeated = sum(len(line) * (count - 1) for line, count in Counter(lines).items())
    return repeated / max(total, 1)


class Duplicates:
    """Texts met so far; two that differ in white space alone are the same."""

    def __init__(self) -> None:
        self._seen: set[bytes] = set()

    def is_new(self, text: str) -> bool:
        """Whether `text` is met for the first time; remembers it."""
        digest = hashlib.blake2b(" ".join(text.split()).encode(errors="surrogatepass"), digest_size=16).digest()
        if digest in self._seen:
            return False
        self._seen.add(digest)
        return True
