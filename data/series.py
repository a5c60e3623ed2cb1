"""Time series from untrusted .npy files: real numbers [n] or [n, C] alone, standardised as a model takes them.

n points of time, C channels. A file is numpy's own format, with one array in it. Its header is read first and has to agree with
the number of bytes that are there, so a small file cannot ask for much memory; pickles are never read. Whatever is refused raises
`BadSeries` with a reason that can be counted.

How many tokens a series becomes follows from its points and its sampling rate (`base/series.py`), so it is planned without
reading it.
"""

import ast
import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from moexpand.base.series import LONGEST

REASONS = ("not_npy", "broken", "dtype", "shape", "empty", "too_long", "too_large", "not_finite", "rate")
"""Every reason of `BadSeries`, to count by."""
CHANNELS = 1024
"""Most channels of a series."""
VALUES = 1 << 27
"""Most values of a series, points times channels: 10^6 points of 134 channels. As float32 they have 512 MiB."""
FILE_BYTES = 1 << 30
"""Most bytes of a file."""
HEADER_BYTES = 4096
"""Most bytes of a header; one of two numbers has 128."""
MARKS = 2
"""Tokens around a series: its start and its end."""
_MAGIC = b"\x93NUMPY"
_LENGTHS = {(1, 0): 2, (2, 0): 4}
"""Version of a file -> bytes that hold the length of its header. Later versions are for names of fields alone."""
_EPSILON = 1e-8
_KINDS = "iuf"


class BadSeries(Exception):
    """A series that cannot be used: a sample to count under `reason`, not a reason to stop.

    Args:
        reason: one of `REASONS`.
        problem: what the series does or is, the rest of a sentence that begins with it, without a full stop.
    """

    def __init__(self, reason: str, problem: str) -> None:
        super().__init__(reason, problem)
        self.reason = reason
        self.problem = problem

    def __str__(self) -> str:
        return self.of("")

    def of(self, which: str) -> str:
        """The sentence about one series, such as `0 of the sample x`."""
        return f"The series {which} {self.problem}." if which else f"The series {self.problem}."


@dataclass(frozen=True)
class SeriesHeader:
    """What a .npy file says of its array."""

    points: int
    channels: int
    dtype: np.dtype[Any]
    by_column: bool
    """Channel after channel (Fortran's order) and not point after point."""
    offset: int
    """First byte of the values."""


def series_header(content: bytes) -> SeriesHeader:
    """Read a file's header and hold it against the limits and the bytes that are there.

    Raises:
        BadSeries: any reason but `not_finite` and `rate`.
    """
    if not content.startswith(_MAGIC):
        raise BadSeries("not_npy", "is no .npy file: it does not begin as numpy's files do")
    version = tuple(content[len(_MAGIC) : len(_MAGIC) + 2])
    if version not in _LENGTHS:
        raise BadSeries(
            "not_npy", f"is no .npy file of version 1.0 or 2.0 ({'.'.join(map(str, version))}), which hold plain numbers"
        )
    begin = len(_MAGIC) + 2 + _LENGTHS[version]
    offset = begin + int.from_bytes(content[len(_MAGIC) + 2 : begin], "little")
    shape, by_column, dtype = _fields(content[begin:offset] if offset - begin <= HEADER_BYTES else b"")
    if dtype.kind not in _KINDS or dtype.names or dtype.subdtype:
        raise BadSeries("dtype", f"holds values of type {dtype}; whole numbers and floating-point numbers are taken")
    if len(shape) not in (1, 2):
        raise BadSeries("shape", f"has the shape {list(shape)}; [points] or [points, channels] is taken")
    points, channels = shape[0], 1 if len(shape) == 1 else shape[1]
    if points < 1 or channels < 1:
        raise BadSeries("empty", f"has the shape {list(shape)} and so no value; at least 1 point is needed")
    if channels > CHANNELS:
        raise BadSeries("shape", f"has {channels} channels; at most {CHANNELS} are taken (points come first, then channels)")
    if points > LONGEST:
        raise BadSeries("too_long", f"has {points} points; at most {LONGEST} are taken")
    if points * channels > VALUES:
        raise BadSeries("too_large", f"has {points} points of {channels} channels; at most {VALUES} values are taken")
    expected, there = points * channels * dtype.itemsize, len(content) - offset
    if expected != there:
        raise BadSeries("broken", f"announces {expected} bytes of values, and its file holds {there}")
    return SeriesHeader(points, channels, dtype, by_column, offset)


def _fields(header: bytes) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Shape, order and type that a header gives: a dictionary in Python's notation."""
    try:
        fields = ast.literal_eval(header.decode("latin-1").strip())
        descr, by_column, shape = fields["descr"], fields["fortran_order"], fields["shape"]
        dtype = np.dtype(descr)
    except (ValueError, TypeError, SyntaxError, KeyError, OverflowError, RecursionError, MemoryError):
        raise BadSeries("not_npy", "has a .npy header that cannot be read") from None
    sides = shape if isinstance(shape, tuple) else (None,)
    if not isinstance(by_column, bool) or not all(isinstance(side, int) and not isinstance(side, bool) for side in sides):
        raise BadSeries("not_npy", "has a .npy header that cannot be read")
    return shape, by_column, dtype


def read_series(content: bytes) -> np.ndarray:
    """A series as the model takes it: float32 [n, C], every channel standardised over time.

    (x - mean) / (std + 1e-8) in float64 with the population's standard deviation, then float32, as LMDeploy does before
    Intern-S1-Pro's encoder. Nothing is cut off.

    Args:
        content: of a .npy file.

    Raises:
        BadSeries: it is no series; `not_finite` names the point and the channel, both from 0.
    """
    header = series_header(content)
    flat = np.frombuffer(content, header.dtype, offset=header.offset)
    order = "F" if header.by_column else "C"
    values = flat.reshape((header.points, header.channels), order=order)  # type: ignore[call-overload]
    made = np.empty(values.shape, np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        for channel in range(header.channels):
            column = values[:, channel].astype(np.float64)
            finite = np.isfinite(column)
            if not finite.all():
                point = int(finite.argmin())
                raise BadSeries("not_finite", f"holds {column[point]} at point {point} of channel {channel}")
            std = column.std()
            if not np.isfinite(std):
                largest = np.abs(column).max()
                raise BadSeries("not_finite", f"holds {largest:g} in channel {channel}, too large for a standard deviation")
            made[:, channel] = (column - column.mean()) / (std + _EPSILON)
    return made


def sampling_rate(points: int, given: Any = None) -> float:
    """The rate of a series in Hz: the given one, or for None a quarter of its points and at least 1, as LMDeploy assumes.

    Raises:
        BadSeries: `rate`: what is given is no finite number above 0.
    """
    if given is None:
        return max(points / 4, 1.0)
    if not is_rate(given):
        raise BadSeries("rate", f"has the sampling rate {given!r}; it must be a finite number above 0, in Hz")
    return float(given)


def is_rate(value: Any) -> bool:
    """Whether a value can be a sampling rate."""
    try:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value > 0
    except OverflowError:  # a whole number beyond float64
        return False
