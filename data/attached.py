"""Pictures and time series that rows and messages bring: the files that they name, and the parts that stand for them."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from moexpand.data.parts import Part, Unusable
from moexpand.data.series import BadSeries, sampling_rate

ENDINGS = {"image": ("png", "jpg", "jpeg", "webp"), "series": ("npy",)}
SERIES_KEY, RATE_KEY = "series", "sampling_rate"


@dataclass(frozen=True)
class Attached:
    """A file that a row or a message brings."""

    kind: str
    """image or series"""
    file: str
    """Path below the folder of the row's file."""
    rate: float | None = None
    """Sampling rate of a series in Hz; None where it is not known."""


def row_series(row: Mapping[str, Any]) -> list[tuple[Any, Any]]:
    """Names and sampling rates of the series of a row: a name or a list of names, and one number for all or a list of numbers.

    Raises:
        Unusable: `series_rate`: not as many numbers as names.
    """
    names, rates = row.get(SERIES_KEY), row.get(RATE_KEY)
    names = names if isinstance(names, list) else [] if names is None or names == "" else [names]
    return list(zip(names, rates_for(len(names), rates), strict=True))


def rates_for(series: int, given: Any) -> list[Any]:
    """The sampling rate of each of so many series: one that is given for all, or a list.

    Raises:
        Unusable: `series_rate`: the list is of another length.
    """
    rates = given if isinstance(given, list) else [given] * series
    if len(rates) != series:
        raise Unusable("series_rate", f"{RATE_KEY} has {len(rates)} numbers for {series} series")
    return rates


def brings_series(row: Mapping[str, Any]) -> bool:
    """Whether a row with a text is meant to bring series too: it names a .npy file, or a sampling rate beside any name."""
    names = row.get(SERIES_KEY)
    named = names if isinstance(names, list) else [names]
    if any(isinstance(name, str) and name.lower().endswith(".npy") for name in named):
        return True
    return bool(names) and row.get(RATE_KEY) not in (None, "")


def attached_by_row(row: Mapping[str, Any]) -> list[Attached]:
    """The series of a row that has no messages.

    Raises:
        Unusable: `series_name`, `series_remote`, `series_rate`.
    """
    return [checked("series", name, rate, "", f"series {number}") for number, (name, rate) in enumerate(row_series(row))]


def checked(kind: str, name: Any, rate: Any, where: str, what: str) -> Attached:
    """A file that somebody named, if its name and its rate are such as can be used.

    Args:
        kind: image or series.
        name: what was given as its name.
        rate: what was given as its sampling rate.
        where: ` of message 3`, or nothing.
        what: who names it: `an image of message 3`.

    Raises:
        Unusable: `image_name`, `remote_image`, `series_name`, `series_remote`, `series_rate`.
    """
    if not isinstance(name, str):
        raise Unusable(f"{kind}_name", f"{what} names no file")
    if "://" in name or name.startswith("data:"):
        reason = "remote_image" if kind == "image" else "series_remote"
        raise Unusable(reason, f"{what} is an address or is inline; name a file instead")
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or path.suffix[1:].lower() not in ENDINGS[kind]:
        raise Unusable(f"{kind}_name", f"{what} must be a file below the row's, ending in {', '.join(ENDINGS[kind])}")
    if kind == "image":
        return Attached(kind, name)
    if isinstance(rate, str):  # all values of CSV are text
        rate = _number(rate)
    try:
        return Attached(kind, name, None if rate is None else sampling_rate(1, rate))
    except BadSeries as problem:
        raise Unusable("series_rate", problem.of(f"{name!r}{where}")) from None


def _number(text: str) -> float | str | None:
    try:
        return float(text) if text.strip() else None
    except ValueError:
        return text


def parts_of(attached: Sequence[Attached]) -> Iterator[Part]:
    """A part for each of several files of one kind: named by its ending, and by its number where there are more."""
    for number, entry in enumerate(attached):
        ending = PurePosixPath(entry.file).suffix[1:].lower()
        part: Part = {entry.kind: ending if len(attached) == 1 else f"{number}.{ending}"}
        yield part if entry.rate is None else part | {"rate": entry.rate}
