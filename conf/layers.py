"""Factors of single layers, such as `0-3x4` or `47x0.5`, as one number for every layer."""

import re
from collections.abc import Sequence

from moexpand.base.errors import InputError

FACTOR = re.compile(r"(\d+)(?:-(\d+))?x(\d+(?:\.\d*)?(?:e-?\d+)?)")


def layer_factors(key: str, words: Sequence[str], layers: int) -> tuple[float, ...]:
    """One factor a layer, 1 where no word names it; empty when there are no words.

    Args:
        key: for the sentence of an error.
        words: LAYERxFACTOR or FIRST-LASTxFACTOR, layers counted from 0.

    Raises:
        InputError: a word of another form, a layer that does not exist or is named twice.
    """
    if not words:
        return ()
    factors: list[float | None] = [None] * layers
    for word in words:
        match = FACTOR.fullmatch(word)
        if match is None:
            raise InputError(f"{key} holds {word!r}; write LAYERxFACTOR or FIRST-LASTxFACTOR, such as [0-3x4,47x0.5].")
        first, last = int(match[1]), int(match[2] or match[1])
        if first > last or last >= layers:
            raise InputError(f"{key} holds {word!r} and the layers of this model are 0 to {layers - 1}.")
        for layer in range(first, last + 1):
            if factors[layer] is not None:
                raise InputError(f"{key} names layer {layer} twice.")
            factors[layer] = float(match[3])
    return tuple(1.0 if factor is None else factor for factor in factors)
