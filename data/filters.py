"""Which samples are worth training on: every filter has a threshold in the configuration and a name under which drops count.

The filters see the measures of a record (measures.py) and nothing else: trying other thresholds needs no source.
"""

from dataclasses import dataclass
from typing import Any

from moexpand.base.errors import InputError


@dataclass(frozen=True)
class Thresholds:
    """Limits that a sample must keep; see the `filters` keys of `moexpand data build`.

    Raises:
        InputError: a threshold lies outside of its range.
    """

    min_characters: int = 200
    """Of running text."""
    max_symbol_ratio: float = 0.4
    """Of running text: characters that are neither letters nor white space."""
    max_repetition: float = 0.5
    """Of running text: characters in lines that occurred before."""
    max_ngram_repetition: float = 0.8
    """Of running text: characters in runs of five words that occurred before."""
    languages: tuple[str, ...] = ()
    """ISO 639 codes that are kept; empty keeps all. Texts too short to tell are kept."""
    min_language_probability: float = 0.0
    """Of the most likely language; 0 keeps everything. Code and tables of numbers score low."""
    min_agreement: float = 0.0
    """Of a caption with the text in its figure; 0 keeps everything, figures without a text layer are kept."""
    min_ink: float = 1.0
    """Standard deviation of the grey levels (0 to 255) of every image."""
    min_score: float | None = None
    """Of the scoring model; None keeps everything, records without a score are kept."""

    def __post_init__(self) -> None:
        fractions = ("max_symbol_ratio", "max_repetition", "max_ngram_repetition", "min_language_probability", "min_agreement")
        for name in fractions:
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise InputError(f"filters.{name} is {getattr(self, name)}, but it is a fraction; give a number from 0 to 1.")
        for name in ("min_characters", "min_ink"):
            if getattr(self, name) < 0:
                raise InputError(f"filters.{name} is {getattr(self, name)}; give 0 or more.")


def drop_reason(kind: str, measures: dict[str, Any], limits: Thresholds) -> str | None:
    """Name of the first filter that refuses a record, or None.

    Args:
        kind: of the record.
        measures: what `measures.measure` gave; a scoring model's value may stand beside it as `score`.
        limits: the thresholds.

    A value equal to its threshold is kept, and a measure that is null refuses nothing. Captions may be short, and tables are full
    of numbers: length, symbols and repetition are limits of running text only.
    """
    if measures["visible"] == 0:
        return "empty"
    if kind == "text":
        if measures["characters"] < limits.min_characters:
            return "too_short"
        if measures["symbol_ratio"] > limits.max_symbol_ratio:
            return "symbols"
        if measures["repetition"] > limits.max_repetition:
            return "repetition"
        if measures["ngram_repetition"] > limits.max_ngram_repetition:
            return "ngram_repetition"
    if measures["refused_images"]:
        return "unreadable_image"
    if any(level is not None and level < limits.min_ink for level in measures["ink"]):
        return "blank_image"
    if measures["language"] is not None:
        if limits.languages and measures["language"] not in limits.languages:
            return "language"
        if measures["language_probability"] < limits.min_language_probability:
            return "language_unclear"
    if measures["agreement"] is not None and measures["agreement"] < limits.min_agreement:
        return "agreement"
    score = measures.get("score")
    if limits.min_score is not None and score is not None and score < limits.min_score:
        return "score"
    return None
