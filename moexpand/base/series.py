"""How a time series becomes tokens: strides, patches and their numbers, from its length and sampling rate alone.

The rule is Intern-S1-Pro's (arXiv 2603.25040, section 2.5, and LMDeploy's serving code): slow series keep nearly every point,
fast ones have a token for some 640 points. Plans need these numbers before a series is read, and the model again.
"""

from typing import Any

import numpy as np

from moexpand.base.errors import InputError

LARGEST_STRIDE = 160
LONGEST = 1_000_000
"""Points of a series that the method is meant for."""


def stride_of(rate: float) -> int:
    """Points from one patch to the next, 2 to 160: floor(160 / (1 + exp(-rate / 100))^6); a patch has twice as many.

    In float32, as the served model computes it: at 1,700 to 3,600 Hz float64 would give 159 and float32 gives 160.

    Args:
        rate: in Hz.

    Raises:
        InputError: the rate is not a positive number.
    """
    if not (isinstance(rate, int | float | np.number) and np.isfinite(rate) and rate > 0):
        raise InputError(f"A series has the sampling rate {rate!r}; a number above 0, in Hz, is needed.")
    base = np.float32(1) + np.exp(-np.float32(rate) / np.float32(100), dtype=np.float32)
    return int(np.floor(np.float32(LARGEST_STRIDE) / base ** np.float32(6)))


def patches_of(length: int, rate: float) -> int:
    """Patches of a series of `length` points: ceil((length - patch) / stride) + 1, and at least 2.

    The end is filled up with zeros. A series shorter than two patches is filled up to two, so that it yields a token; the formula
    alone would give it none.

    Raises:
        InputError: there is no point, or the rate is none.
    """
    if length < 1:
        raise InputError(f"A series has {length} points; at least 1 is needed.")
    return int(_patches(length, stride_of(rate)))


def padded_length(length: int, rate: float) -> int:
    """Points of the series with the zeros behind it."""
    return (patches_of(length, rate) + 1) * stride_of(rate)


def tokens_of(length: int, rate: float) -> int:
    """Tokens of a series: patches are joined in pairs, of which the encoder's second convolution takes every second."""
    return (patches_of(length, rate) // 2 + 1) // 2


def tokens_of_many(lengths: np.ndarray, rates: np.ndarray) -> np.ndarray:
    """`tokens_of` of many series: int64 [S] for int64 [S] and float64 [S]."""
    distinct, place = np.unique(rates, return_inverse=True)
    # Strides rate by rate: numpy may round powers of arrays otherwise than those of single numbers.
    strides = np.array([stride_of(rate) for rate in distinct.tolist()], dtype=np.int64)[place]
    return (_patches(lengths, strides) // 2 + 1) // 2


def _patches(lengths: Any, strides: Any) -> Any:
    return np.maximum(2, -(-(lengths - 2 * strides) // strides) + 1)
